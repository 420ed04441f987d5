// What rounding the columns of a block, one code after the other, needs from its caller.
#pragma once

#include <stdint.h>

#include "paley.h"

namespace paley {

struct ColumnsTask {
  const paley_table& table;
  int32_t rows, columns;
  const float* x;  // feedback: weights; descent: the gradient. [rows, columns]
  int64_t x_row;
  const float* matrix;   // feedback: spread; descent: gram. [columns, columns]
  const float* inverse;  // descent: [codes, p, p]
  const float* scales;   // [rows, columns] by its strides
  const float* zeros;    // or null
  int64_t scale_row, scale_column;
  int32_t threads;
  int32_t* codes;  // [rows, codes]
  float* change;   // feedback: errors; descent: moves. [rows, columns]
};

struct FollowTask {
  int32_t rows, columns, width, threads;
  const float* moves;  // [rows, columns]
  const float* gram;   // [columns, width]
  float* pull;         // [rows, width]
};

namespace avx512 {
void feedback(const ColumnsTask& task);
void descent(const ColumnsTask& task);
void follow(const FollowTask& task);
}  // namespace avx512
namespace avx2 {
void feedback(const ColumnsTask& task);
void descent(const ColumnsTask& task);
void follow(const FollowTask& task);
}  // namespace avx2
namespace portable {
void feedback(const ColumnsTask& task);
void descent(const ColumnsTask& task);
void follow(const FollowTask& task);
}  // namespace portable

}  // namespace paley
