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

PALEY_TARGET_BEGIN("popcnt,avx2,fma,avx512f,avx512bw")
namespace paley::avx512 {

constexpr int W = 64;
using Bytes = __m512i;

PALEY_INLINE Bytes all(uint8_t a) { return _mm512_set1_epi8(static_cast<char>(a)); }
PALEY_INLINE Bytes load(const void* p) { return _mm512_loadu_si512(p); }
PALEY_INLINE void store(void* p, Bytes a) { _mm512_storeu_si512(p, a); }
PALEY_INLINE Bytes plus(Bytes a, Bytes b) { return _mm512_adds_epu8(a, b); }
PALEY_INLINE Bytes minus(Bytes a, Bytes b) { return _mm512_subs_epu8(a, b); }
PALEY_INLINE Bytes min(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
PALEY_INLINE uint8_t least_of(Bytes a) {
  const __m256i b = _mm256_min_epu8(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i c = _mm_min_epu8(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  c = _mm_min_epu8(c, _mm_srli_epi16(c, 8));
  return static_cast<uint8_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_and_si128(c, _mm_set1_epi16(255))), 0));
}

// Bytes p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Bytes spread_over(const uint8_t* p) {
  if constexpr (K >= W) {
    return all(*p);
  } else if constexpr (K == 32) {
    int16_t two;
    std::memcpy(&two, p, sizeof two);
    const Bytes lanes = _mm512_set_epi64(0x0101010101010101, 0x0101010101010101, 0x0101010101010101,
                                         0x0101010101010101, 0, 0, 0, 0);
    return _mm512_shuffle_epi8(_mm512_set1_epi16(two), lanes);
  } else if constexpr (K == 16) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const Bytes lanes = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0202020202020202,
                                         0x0202020202020202, 0x0101010101010101, 0x0101010101010101, 0, 0);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(four), lanes);
  } else if constexpr (K == 8) {
    int64_t eight;
    std::memcpy(&eight, p, sizeof eight);
    const Bytes lanes = _mm512_set_epi64(0x0707070707070707, 0x0606060606060606, 0x0505050505050505,
                                         0x0404040404040404, 0x0303030303030303, 0x0202020202020202,
                                         0x0101010101010101, 0);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(eight), lanes);
  } else if constexpr (K == 4) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const Bytes lanes = _mm512_set_epi64(0x0F0F0F0F0E0E0E0E, 0x0D0D0D0D0C0C0C0C, 0x0B0B0B0B0A0A0A0A,
                                         0x0909090908080808, 0x0707070706060606, 0x0505050504040404,
                                         0x0303030302020202, 0x0101010100000000);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), lanes);
  } else {
    const Bytes wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_or_si512(wide, _mm512_slli_epi16(wide, 8));
  }
}

#include "trellis_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
