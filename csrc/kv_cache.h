// The keys and values of one text, packed, in pages of a few tokens: a context grows without being copied.
//
// Codes, scales and zeros are those of PackedKV in src/paley/ops/attention.py: for each token and head a row of codes,
// float16 scales and uint8 zeros of its groups. A side that is not quantized is float16.
//
// Codes of B bits lie in planes of 8, 4, 2 or 1 bits, those that make up B, the lowest bits first. A plane of P bits
// serves vectors whose bytes are single codes: 8 / P such vectors share their memory, one for each shift by P bits.
// - Keys: a quad is four columns of one token, a byte each. 16 tokens make a vector, and a dword of a token holds 8 / P
//   quads, one after the other. [plane, dword, token]; float16: [column, token]. So a product with a query sums each
//   token's score in a lane of its own.
// - Values: an oct is eight columns, four tokens of each, a byte each. 32 bytes hold 8 / P octs, one after the other.
//   [token / 4, plane, 32 bytes: column, token % 4]; float16: [token, column]. So a product with weights sums each
//   column in a lane of its own.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "paley.h"
#include "platform.h"

namespace paley {

constexpr int64_t PAGE = 64;      // tokens; attention takes those of a page at a time
constexpr int64_t SEGMENT = 512;  // tokens whose weights are summed by themselves
constexpr int32_t MAX_ROWS = 64;  // queries that attention takes at a time
constexpr int32_t LANES = 16;     // rows of floats are filled up to multiples of it, also RoPE's tables
constexpr int64_t ROOM = 64;      // bytes behind a page's codes that may be read

constexpr int64_t QUAD = 4, OCT = 8;
// Dwords of so many quads, or pieces of 32 bytes of so many octs, in a plane of P bits.
constexpr int64_t plane_units(int64_t parts, int32_t p) { return (parts * p + 7) / 8; }

// Keys or values of a layer, as they are stored.
struct Side {
  int32_t heads, width;  // values of a head, after its transform
  int32_t padded;        // width, up to a multiple of LANES
  int32_t bits;          // of a code; 16: float16
  int32_t group, groups; // values that share a scale; their number
  bool affine;
  const float* points;  // [2^bits], or null for an even grid: first + step * code
  float first, step;
  bool is_keys;

  int64_t row_bytes, scales, zeros, bytes;  // of a token's codes of a head; where the parts of a page's half begin; all

  void lay_out();
  int64_t token_bytes() const { return heads * (row_bytes + groups * (affine ? 3 : 2)); }
  uint8_t* codes(uint8_t* half, int32_t head) const { return half + head * PAGE * row_bytes; }
  // Of the tokens of a page.
  uint16_t* scales_of(uint8_t* half, int32_t head, int32_t group_) const {
    return reinterpret_cast<uint16_t*>(half + scales) + (int64_t{head} * groups + group_) * PAGE;
  }
  uint8_t* zeros_of(uint8_t* half, int32_t head, int32_t group_) const {
    return half + zeros + (int64_t{head} * groups + group_) * PAGE;
  }
  // Stores the codes [width] of a token, or its values as float16.
  void put_codes(uint8_t* half, int32_t head, int64_t place, const uint8_t* row) const;
  void put_halves(uint8_t* half, int32_t head, int64_t place, const uint16_t* row) const;
};

// The keys and values of PAGE tokens of one layer; null if they have left the window.
struct Page {
  std::unique_ptr<uint8_t[]> keys, values;
};

}  // namespace paley
