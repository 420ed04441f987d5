#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

PALEY_TARGET_BEGIN("popcnt,avx2,fma")
namespace paley::avx2 {

constexpr int W = 16;
using Words = __m256i;

PALEY_INLINE Words all(uint16_t a) { return _mm256_set1_epi16(static_cast<short>(a)); }
PALEY_INLINE Words load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PALEY_INLINE void store(void* p, Words a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
PALEY_INLINE Words less(Words a, Words b) { return _mm256_subs_epi16(a, b); }
PALEY_INLINE Words square(Words a) { return _mm256_mulhrs_epi16(a, a); }
PALEY_INLINE Words plus(Words a, Words b) { return _mm256_adds_epu16(a, b); }
PALEY_INLINE Words minus(Words a, Words b) { return _mm256_subs_epu16(a, b); }
PALEY_INLINE Words min(Words a, Words b) { return _mm256_min_epu16(a, b); }
PALEY_INLINE uint16_t least_of(Words a) {
  const __m128i b = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(b), 0));
}

// Words p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Words spread_over(const uint16_t* p) {
  if constexpr (K >= W) {
    return all(*p);
  } else if constexpr (K == 8) {
    int32_t two;
    std::memcpy(&two, p, sizeof two);
    const Words lanes =
        _mm256_set_epi64x(0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(two), lanes);
  } else if constexpr (K == 4) {
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    const Words lanes =
        _mm256_set_epi64x(0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
    return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), lanes);
  } else {
    const Words wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
  }
}

#include "trellis_search.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
