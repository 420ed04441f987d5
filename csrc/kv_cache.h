// The keys and values of one text, packed, in pages of a few tokens: a context grows without being copied.
//
// Codes, scales and zeros are those of PackedKV in src/paley/ops/attention.py: for each token and head a row of codes
// as a dense bit stream, float16 scales and uint8 zeros of its groups. A side that is not quantized is float16.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "paley.h"
#include "platform.h"

namespace paley {

constexpr int64_t PAGE = 64;         // tokens
constexpr int64_t BLOCK_ROWS = 32;   // tokens that attention decodes at a time; divides PAGE
constexpr int64_t SEGMENT = 128;     // tokens whose weights are summed by themselves
constexpr int32_t MAX_ROWS = 64;     // queries that attention takes at a time
constexpr int32_t LANES = 16;        // rows of floats are filled up to multiples of it, also RoPE's tables
constexpr int64_t ROOM = 16;         // bytes behind a page that may be read

// Keys or values of a layer, as they are stored.
struct Side {
  int32_t heads, width;  // values of a head, after its transform
  int32_t padded;        // width, up to a multiple of LANES
  int32_t bits;          // of a code; 16: float16
  int32_t group, groups; // values that share a scale; their number
  bool affine;
  const float* points;  // [2^bits], or null for an even grid: first + step * code
  float first, step;

  int64_t row_bytes, codes, scales, zeros, bytes;  // of a row of codes; where parts of a page's half begin; all of it

  void lay_out();
  int64_t token_bytes() const { return heads * (row_bytes + groups * (affine ? 3 : 2)); }
  uint8_t* row(uint8_t* half, int32_t head, int64_t token) const {
    return half + (head * PAGE + token) * row_bytes;
  }
  uint16_t* scale(uint8_t* half, int32_t head, int64_t token) const {
    return reinterpret_cast<uint16_t*>(half + scales) + (head * PAGE + token) * groups;
  }
  uint8_t* zero(uint8_t* half, int32_t head, int64_t token) const {
    return half + zeros + (head * PAGE + token) * groups;
  }
};

// The keys and values of PAGE tokens of one layer; null if they have left the window.
struct Page {
  std::unique_ptr<uint8_t[]> keys, values;
};

// codes [n] of `bits` bits -> a dense stream, least significant first. bytes: ceil(n * bits / 8)
void pack_bits(const uint8_t* codes, int32_t n, int32_t bits, uint8_t* to, int64_t bytes);

}  // namespace paley
