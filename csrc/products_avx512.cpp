#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "products.h"

PALEY_TARGET_BEGIN("avx2,avx512f")
namespace paley::avx512 {

struct Vectors {
  static constexpr int64_t COUNT = 16, VECTORS = 3, TALL = 8, WORDS = 2;
  using Vector = __m512;
  using Words = __m512;
  static PALEY_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static PALEY_INLINE Words load(const uint32_t* words) { return _mm512_castsi512_ps(_mm512_loadu_si512(words)); }
  static PALEY_INLINE Words all(uint32_t word) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
  }
  static PALEY_INLINE Vector add(Vector sum, Words a, Words b) { return _mm512_fmadd_ps(a, b, sum); }
  static PALEY_INLINE void store(float* out, Vector sum) { _mm512_storeu_ps(out, sum); }
};

#include "products_vectors.h"
#include "products_tiles.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
