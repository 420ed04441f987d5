#include "products.h"

#include <algorithm>
#include <new>

#include "platform.h"

extern "C" int32_t paley_products(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                                  int64_t b_column, int64_t m, int64_t n, int64_t k, int32_t add, int32_t upper,
                                  int32_t level, int32_t threads, float* c) {
  if (m < 0 || n < 0 || k < 0 || threads < 1 || level < PALEY_PORTABLE || level > paley_best_products_level()) {
    return PALEY_BAD_ARGUMENT;
  }
  const paley::ProductsTask task{{a, a_row, a_column}, {b, b_row, b_column}, m, n, k, add != 0, upper != 0, threads, c};
  if (k == 0 && !add) std::fill_n(c, m * n, 0.0f);
  try {
#if PALEY_X86
    if (level == PALEY_AMX_BF16) return paley::amx_bf16::products(task), PALEY_OK;
    if (level == PALEY_AVX512_BF16) return paley::avx512_bf16::products(task), PALEY_OK;
    if (level == PALEY_AVX512) return paley::avx512::products(task), PALEY_OK;
    if (level == PALEY_AVX2) return paley::avx2::products(task), PALEY_OK;
#endif
    paley::portable::products(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
