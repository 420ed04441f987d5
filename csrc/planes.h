// The product of two-bit weights and four-bit inputs: what its parts share, and how weights lie in memory.
// The formula is in src/paley/core/planes.py, its parts in planes_product.h.
#pragma once

#include <stdint.h>

#include <cstring>

#include "platform.h"

namespace paley {

struct PlanesTask {
  const uint8_t* codes;  // [tokens, groups * group_size]
  const float* scales;   // [tokens, groups]
  const uint8_t* zeros;  // [tokens, groups]
  int64_t tokens;
  const uint8_t* blob;  // after its header
  int32_t out;
  int32_t groups;
  int32_t words;  // of 32 columns, in a group
  bool mirrored;  // the sum over S & Q has the factor 0 everywhere
  int32_t path;   // of paley_path, never auto
  int32_t threads;
  float* y;  // [tokens, out]
};

// The blob: a header, then a record for each group of columns of each block of 16 rows, the records in the order in
// which they are read: panel of four blocks, group, block. A record is `words` times S [16] and Q [16], a 32-bit word
// for each row, then the centroids as float16 [4, 16]. So it takes no more than the checkpoint, at groups of 128
// columns 2.5 bits a weight: products with one token wait for memory. Rows that fill the last block up are zeros.
constexpr int BLOCK = 16;
constexpr int PANEL = 4 * BLOCK;
constexpr int MAX_WORDS = 16;  // so that sums over 512 columns stay below 2^13; see planes_avx512.h

struct PlanesHeader {
  uint32_t magic;
  int32_t out, groups, words;
  int32_t mirrored;
  int32_t unused[11];  // records start at a multiple of 64 bytes
};
constexpr uint32_t PLANES_MAGIC = 0x314e4c50;  // "PLN1"

constexpr int64_t WORD_BYTES = 2 * BLOCK * sizeof(uint32_t);
constexpr int64_t record_bytes(int words) { return words * WORD_BYTES + 4 * BLOCK * sizeof(uint16_t); }

// Blocks of the panel that starts at this row.
PALEY_INLINE int blocks_from(int64_t row, int32_t out) {
  return row + PANEL <= out ? PANEL / BLOCK : static_cast<int>((out - row + BLOCK - 1) / BLOCK);
}

// One bit of each of 32 codes as a word: bit i of byte b is that of column 4i + b, so that (word >> i) & 0x01010101 is
// four columns side by side as bytes. Weights and inputs share this order, so it does not change popcounts.
PALEY_INLINE uint32_t plane_word(const uint8_t* codes, int bit) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * i, sizeof four);
    word |= (four >> bit & 0x01010101u) << i;
  }
  return word;
}

namespace avx512 {
void planes_matmul(const PlanesTask& task);
}
namespace avx2 {
void planes_matmul(const PlanesTask& task);
}
namespace portable {
void planes_matmul(const PlanesTask& task);
}

}  // namespace paley
