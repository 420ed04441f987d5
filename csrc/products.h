// The product of two matrices whose entries are rounded to bfloat16; sums are float32.
#pragma once

#include <stdint.h>

#include "paley.h"

namespace paley {

// c [m, n] = a [m, k] times b [n, k] transposed, or is added to; entries lie `row` and `column` floats apart.
struct ProductsTask {
  struct Matrix {
    const float* start;
    int64_t row, column;
  } a, b;
  int64_t m, n, k;
  bool add, upper;  // upper: nothing below the diagonal is wanted
  int threads;
  float* c;
};

constexpr int64_t PRODUCTS_RUN = 512;  // values of k that are summed from 0

namespace portable {
void products(const ProductsTask& task);
}
namespace avx2 {
void products(const ProductsTask& task);
}
namespace avx512 {
void products(const ProductsTask& task);
}
namespace avx512_bf16 {
void products(const ProductsTask& task);
}
namespace amx_bf16 {
void products(const ProductsTask& task);
}

}  // namespace paley
