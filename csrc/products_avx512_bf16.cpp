#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "products.h"

PALEY_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512bf16")
namespace paley::avx512_bf16 {

// A pair in each word: the instruction adds the product of the odd values, then that of the even ones.
struct Vectors {
  static constexpr int64_t COUNT = 16, VECTORS = 3, TALL = 8, WORDS = 1;
  using Vector = __m512;
  using Words = __m512bh;
  static PALEY_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static PALEY_INLINE Words load(const uint32_t* words) { return (Words)_mm512_loadu_si512(words); }
  static PALEY_INLINE Words all(uint32_t word) { return (Words)_mm512_set1_epi32(static_cast<int>(word)); }
  static PALEY_INLINE Vector add(Vector sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, a, b); }
  static PALEY_INLINE void store(float* out, Vector sum) { _mm512_storeu_ps(out, sum); }
};

#include "products_vectors.h"
#include "products_tiles.h"
}  // namespace paley::avx512_bf16
PALEY_TARGET_END
#endif
