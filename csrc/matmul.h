// The product of integer inputs with a coded weight, a panel of 16 output rows after the other, on the calling thread.
//
// A prepared matrix is one blob, made once (`matrix_bytes`, `pack_matrix`) and read only afterwards; it may be mapped
// from a file. Inputs are made of float32 rows (`encode_inputs`), once for all matrices of one `InputsLayout`. Sums of
// products are exact integers, and floats are added in one order: results depend on neither level nor on who computes
// which rows.
//
// y[t, r] = sum over groups g of columns of scale[r, g] * (sum over segments s of g of step[t, s] * (sum over columns
// of s of weight[r, c] * code[t, c] - zero[r, g] * (sum of the codes)))
#pragma once

#include <stdint.h>

#include "paley.h"

namespace paley {

constexpr int PANEL_ROWS = 16;
constexpr int BLOCK_DWORDS = 8;  // a segment's columns lie in blocks of eight times four bytes for each row

// How codes lie in the blob and become integers: PALEY_TABLE2 and so on.
using Kind = paley_matrix_kind;

// Where inputs lie, and their scales. Matrices that agree in it, and read the same rounded values, share inputs.
struct InputsLayout {
  int32_t columns;  // of a row, as stored
  int32_t group;    // columns that share a weight's scale
  int32_t segment;  // columns that share an input's scale, at most; the last one of a group may be shorter
  int32_t per;      // columns in four bytes: 4 or 3 codes of a byte, or 2 of 16 bits
  // Of the main part; outliers have one segment more.
  int32_t segments_of_group, segments, outliers;
  int64_t row_bytes;  // of the codes of a token, a multiple of 64

  bool operator==(const InputsLayout& o) const {
    return columns == o.columns && group == o.group && segment == o.segment && per == o.per && outliers == o.outliers;
  }
  // Bytes of the inputs of so many tokens, and 64 that a product may read.
  int64_t bytes(int64_t tokens) const { return tokens * (row_bytes + 8 * int64_t{segments}) + 64; }
};

// A view of inputs; the buffer is the caller's, of layout.bytes(tokens), aligned to 64 bytes if it is to be fast.
struct Inputs {
  InputsLayout layout;
  int64_t tokens;
  uint8_t* codes;  // [tokens, row_bytes]: int8, or int16 if per == 2; 0 where nothing is
  float* steps;    // [tokens, segments]
  int32_t* sums;   // [tokens, segments], of the codes

  static Inputs in(uint8_t* buffer, const InputsLayout& layout, int64_t tokens);
};

// What pack_matrix makes a blob of, and how values become codes: see paley.h.
using MatrixSource = paley_matrix_source;
using PackedCodes = paley_packed_codes;
using InputsHow = paley_inputs_how;

// A prepared matrix, viewed. `open` checks everything that a damaged blob could break.
struct Matrix {
  int32_t out;
  Kind kind;
  InputsLayout layout;
  bool fine, affine;
  float table_scale;
  const uint8_t* table;   // as its kind needs it
  const uint8_t* panels;  // records: see matmul_layout.h
  int64_t group_bytes, panel_bytes;
  const int32_t* outlier_columns;

  // -> whether bytes of the blob, aligned to 4, are a whole matrix.
  static bool open(const uint8_t* blob, int64_t bytes, Matrix* matrix);
};

// -> bytes of the blob, or -1 if there can be none of this shape and kind. Reads no arrays.
int64_t matrix_bytes(const MatrixSource& source);
// Fills a blob of matrix_bytes; packed: in place of source.codes, or null. -> false for codes, points or columns that
// are out of range. Throws std::bad_alloc.
bool pack_matrix(const MatrixSource& source, const PackedCodes* packed, int threads, uint8_t* blob);

// x [count, in] float32, tokens first .. first + count of `inputs`. Throws std::bad_alloc.
// A thread can take some tokens, others the rest.
void encode_inputs(const InputsHow& how, const float* x, int64_t first, int64_t count, const Inputs& inputs);

// Rows row_begin .. row_end of y [tokens, out], stride y_row floats; row_begin is a multiple of 16. Throws
// std::bad_alloc (only for 2 tokens or more). level: at most best_matmul_level().
void matmul(const Matrix& matrix, const Inputs& inputs, int32_t row_begin, int32_t row_end, float* y, int64_t y_row,
            int32_t level);

// The best level of this machine, or the one that $PALEY_ISA names, if the machine has it.
int32_t best_matmul_level();

}  // namespace paley
