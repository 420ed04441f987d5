// Where trellis codes lie, and what they stand for.
//
// The codes of a row are a stream of bits, the highest bit of the first code first. 32 bits of it are a dword of its
// row, the first one on top. A block has the stream of 32 columns, or of 16 if inputs are fine: dwords of 16 rows, then
// the next, and last, if 16 bits are left over, words of 16 rows. The state of a code is the 12 bits of the stream that
// end with it. So the states of four columns lie within some 15 to 30 bits, their window, and some of these may be of
// the block before.
#pragma once

#include <cstring>

#include "matmul_layout.h"

namespace paley {

template <Kind KIND, bool FINE>
struct Stream {
  static constexpr int BITS = trellis_bits(KIND), P = trellis_p(KIND), STATE = 12, WORDS = trellis_words(KIND, FINE);
  static constexpr int OF_FOUR = 4 * BITS / P;           // bits of four columns
  static constexpr int WINDOW = OF_FOUR + STATE - BITS;  // of the states of four columns
  static constexpr int PLANES = (WORDS + 1) / 2;

  // The window of columns 4 d to 4 d + 3: which dword it starts in, -1 for that of the block before, and at which bit.
  static constexpr int start(int d) { return 32 + OF_FOUR * d - (STATE - BITS); }
  static constexpr int plane(int d) { return start(d) / 32 - 1; }
  static constexpr int offset(int d) { return start(d) % 32; }
  static constexpr bool in_two(int d) { return offset(d) + WINDOW > 32; }
  // A dword is words if these are all that is left.
  static constexpr bool short_plane(int plane) {
    return WORDS % 2 && (plane < 0 || plane == PLANES - 1);
  }
  static constexpr int at(int plane) { return plane < 0 ? -trellis_before(KIND, FINE) : 64 * plane; }
  // In a dword that starts with the window, or at its offset if that is in one: how far the state of column 4 d + i is
  // from the lowest bit.
  static constexpr int shift(int d, int i) { return 32 - (in_two(d) ? 0 : offset(d)) - BITS * (i / P) - STATE; }

  static uint32_t dword(const uint8_t* block, int plane, int row) {
    if (!short_plane(plane)) {
      uint32_t bits;
      std::memcpy(&bits, block + at(plane) + 4 * row, sizeof bits);
      return bits;
    }
    uint16_t bits;
    std::memcpy(&bits, block + at(plane) + 2 * row, sizeof bits);
    return plane < 0 ? bits : uint32_t{bits} << 16;
  }

  // Four values of a row: of column 4 d on.
  static void values(const uint8_t* table, const uint8_t* block, int d, int row, uint8_t* out) {
    uint32_t bits = dword(block, plane(d), row);
    if (in_two(d)) {
      bits = bits << offset(d) | dword(block, plane(d) + 1, row) >> (32 - offset(d));
    }
    for (int i = 0; i < 4; ++i) {
      const uint32_t state = bits >> shift(d, i);
      const uint8_t* lists = table + 128 * (i % P);
      const int place = (lists[state & 63] + lists[64 + (state >> 6 & 63)]) & 255, upper = place >> 7;
      const uint8_t point = table[256 + (upper ? 255 - place : place)];
      out[i] = static_cast<uint8_t>(upper ? -point : point);
    }
  }
};

}  // namespace paley
