#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "products.h"

PALEY_TARGET_BEGIN("avx2,fma")
namespace paley::avx2 {

struct Vectors {
  static constexpr int64_t COUNT = 8, VECTORS = 3, TALL = 4, WORDS = 2;
  using Vector = __m256;
  using Words = __m256;
  static PALEY_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static PALEY_INLINE Words load(const uint32_t* words) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(words));
  }
  static PALEY_INLINE Words all(uint32_t word) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
  }
  static PALEY_INLINE Vector add(Vector sum, Words a, Words b) { return _mm256_fmadd_ps(a, b, sum); }
  static PALEY_INLINE void store(float* out, Vector sum) { _mm256_storeu_ps(out, sum); }
};

#include "products_vectors.h"
#include "products_tiles.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
