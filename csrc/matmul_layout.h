// Where the codes of a prepared matrix lie.
//
// A blob: a header of 128 bytes, the table, the outlier columns, and from the next multiple of 64 on a record for each
// panel of 16 rows. A record: for each group of columns its parameters and the blocks of its segments; then, if there
// are outliers, their parameters and blocks of kind BYTES. Parameters: 16 scales as float16; if the matrix is affine 16
// zero points, and 16 bytes free; OWN2: the points of 16 rows, four bytes each; TRELLIS: the codes before the group's
// first, as they would lie in the block before.
//
// A dword is four bytes of a row: `per` columns as integers. A block holds 8 dwords of each of the 16 rows. Its vectors
// are those of 64 bytes, the four bytes of a row side by side, as VNNI and AMX read them.
#pragma once

#include "matmul.h"
#include "platform.h"

namespace paley {

struct MatrixHeader {
  uint32_t magic;
  int32_t out, columns, group, segment, kind, fine, per, affine, outliers;
  float table_scale;
  int32_t table_bytes;
  int64_t bytes;
  int32_t unused[18];
};
static_assert(sizeof(MatrixHeader) == 128);
constexpr uint32_t MATRIX_MAGIC = 0x31585450;  // "PTX1"

constexpr bool is_look(Kind kind) { return kind >= PALEY_LOOK8 && kind <= PALEY_LOOK12; }
constexpr bool is_plain(Kind kind) { return kind == PALEY_BYTES || kind == PALEY_WORDS; }
constexpr bool is_trellis(Kind kind) { return kind >= PALEY_TRELLIS1 && kind <= PALEY_TRELLIS6; }
// Bits of a trellis code, and the values that it stands for.
constexpr int trellis_bits(Kind kind) {
  switch (kind) {
    case PALEY_TRELLIS1: return 1;
    case PALEY_TRELLIS2: return 2;
    case PALEY_TRELLIS1_5:
    case PALEY_TRELLIS3: return 3;
    case PALEY_TRELLIS4: return 4;
    case PALEY_TRELLIS6: return 6;
    case PALEY_TRELLIS3_5: return 7;
    default: return 5;
  }
}
constexpr int trellis_p(Kind kind) {
  return kind == PALEY_TRELLIS1_5 || kind == PALEY_TRELLIS2_5 || kind == PALEY_TRELLIS3_5 ? 2 : 1;
}
constexpr int trellis_columns(bool fine) { return (fine ? 2 : 4) * BLOCK_DWORDS; }  // of a block
// Words of 16 bits of a row's codes in a block.
constexpr int trellis_words(Kind kind, bool fine) {
  return trellis_columns(fine) * trellis_bits(kind) / trellis_p(kind) / 16;
}
// Bytes of the codes before the first block of a group.
constexpr int trellis_before(Kind kind, bool fine) { return trellis_words(kind, fine) % 2 ? 32 : 64; }
// Bits of a LOOK code above its lower byte.
constexpr int look_high(Kind kind) {
  return kind == PALEY_LOOK9 ? 1 : kind == PALEY_LOOK10 ? 2 : kind == PALEY_LOOK12 ? 4 : 0;
}

// Bytes of a block.
constexpr int64_t block_bytes(Kind kind, bool fine) {
  switch (kind) {
    case PALEY_TABLE2:
    case PALEY_OWN2:
    case PALEY_PAIRS4: return 128;
    case PALEY_TABLE3:
    case PALEY_PAIRS6: return 192;
    case PALEY_TABLE4:
    case PALEY_PAIRS8: return 256;
    case PALEY_TABLE6: return 384;
    case PALEY_BYTES: return fine ? 256 : 512;
    case PALEY_WORDS: return 512;
    case PALEY_LOOK8:
    case PALEY_LOOK9:
    case PALEY_LOOK10:
    case PALEY_LOOK12: break;
    default: return 32 * trellis_words(kind, fine);
  }
  return 128 + 16 * look_high(kind);
}

constexpr int64_t parameter_bytes(Kind kind, bool fine, bool affine) {
  if (is_trellis(kind)) return 32 + trellis_before(kind, fine);
  return kind == PALEY_OWN2 ? 96 : affine ? 64 : 32;
}

constexpr int64_t table_bytes(Kind kind) {
  switch (kind) {
    case PALEY_TABLE2:
    case PALEY_TABLE3:
    case PALEY_TABLE4: return 16;
    case PALEY_TABLE6: return 64;
    case PALEY_PAIRS4: return 2 * 16;
    case PALEY_PAIRS6: return 2 * 64;
    case PALEY_PAIRS8: return 2 * 256;
    case PALEY_LOOK8: return 4 * 256;
    case PALEY_LOOK9: return 4 * 512;
    case PALEY_LOOK10: return 4 * 1024;
    case PALEY_LOOK12: return 4 * 4096;
    default: return is_trellis(kind) ? 256 + 128 : 0;
  }
}

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of so many columns.
constexpr int64_t blocks_of(int64_t columns, int32_t per) { return divided_up(columns, int64_t{per} * BLOCK_DWORDS); }

inline int64_t blocks_of_group(const InputsLayout& layout) {
  const int32_t whole = layout.group / layout.segment, rest = layout.group % layout.segment;
  return whole * blocks_of(layout.segment, layout.per) + blocks_of(rest, layout.per);
}

// Bytes of the outliers of a panel.
inline int64_t outlier_bytes(const InputsLayout& layout, bool fine) {
  return layout.outliers ? 32 + blocks_of(layout.outliers, fine ? 2 : 4) * block_bytes(PALEY_BYTES, fine) : 0;
}

}  // namespace paley
