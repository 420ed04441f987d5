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

// Bytes p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Bytes spread_over(const uint8_t* p) {
  if constexpr (K >= W) {
    return all(*p);
  } else if constexpr (K == 16) {
    int16_t two;
    std::memcpy(&two, p, sizeof two);
    const Bytes lanes = _mm256_set_epi64x(0x0101010101010101, 0x0101010101010101, 0, 0);
    return _mm256_shuffle_epi8(_mm256_set1_epi16(two), lanes);
  } else if constexpr (K == 8) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const Bytes lanes = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(four), lanes);
  } else if constexpr (K == 4) {
    int64_t eight;
    std::memcpy(&eight, p, sizeof eight);
    const Bytes lanes =
        _mm256_set_epi64x(0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000);
    return _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), lanes);
  } else {
    const Bytes wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_or_si256(wide, _mm256_slli_epi16(wide, 8));
  }
}

#include "trellis_search.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
