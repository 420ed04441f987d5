#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

PALEY_TARGET_BEGIN("popcnt,avx2,fma")
namespace paley::avx2 {

constexpr int W = 32;
using Bytes = __m256i;

PALEY_INLINE Bytes all(uint8_t a) { return _mm256_set1_epi8(static_cast<char>(a)); }
PALEY_INLINE Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PALEY_INLINE void store(void* p, Bytes a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
PALEY_INLINE Bytes plus(Bytes a, Bytes b) { return _mm256_adds_epu8(a, b); }
PALEY_INLINE Bytes minus(Bytes a, Bytes b) { return _mm256_subs_epu8(a, b); }
PALEY_INLINE Bytes min(Bytes a, Bytes b) { return _mm256_min_epu8(a, b); }
PALEY_INLINE uint8_t least_of(Bytes a) {
  __m128i b = _mm_min_epu8(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_min_epu8(b, _mm_srli_epi16(b, 8));
  return static_cast<uint8_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_and_si128(b, _mm_set1_epi16(255))), 0));
}

// The N bytes at p, again and again.
template <int N>
PALEY_INLINE Bytes again(const uint8_t* p) {
  if constexpr (N == 1) return all(*p);
  if constexpr (N == 2) return _mm256_set1_epi16(read<int16_t>(p));
  if constexpr (N == 4) return _mm256_set1_epi32(read<int32_t>(p));
  if constexpr (N == 8) return _mm256_set1_epi64x(read<int64_t>(p));
}

// Bytes p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Bytes repeated(const uint8_t* p) {
  if constexpr (K >= W) return again<1>(p);
  if constexpr (K > 2 && K < W) return _mm256_shuffle_epi8(again<W / K>(p), load(REPEATS<W, K>.lanes));
  if constexpr (K == 2) {
    const Bytes words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_or_si256(words, _mm256_slli_epi16(words, 8));
  }
}

#include "trellis_search.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
