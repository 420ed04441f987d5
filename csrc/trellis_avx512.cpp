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

constexpr int W = 32;
using Words = __m512i;

PALEY_INLINE Words all(uint16_t a) { return _mm512_set1_epi16(static_cast<short>(a)); }
PALEY_INLINE Words load(const void* p) { return _mm512_loadu_si512(p); }
PALEY_INLINE void store(void* p, Words a) { _mm512_storeu_si512(p, a); }
PALEY_INLINE Words less(Words a, Words b) { return _mm512_subs_epi16(a, b); }
PALEY_INLINE Words square(Words a) { return _mm512_mulhrs_epi16(a, a); }
PALEY_INLINE Words plus(Words a, Words b) { return _mm512_adds_epu16(a, b); }
PALEY_INLINE Words minus(Words a, Words b) { return _mm512_subs_epu16(a, b); }
PALEY_INLINE Words min(Words a, Words b) { return _mm512_min_epu16(a, b); }
PALEY_INLINE uint16_t least_of(Words a) {
  const __m256i b = _mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i c = _mm_min_epu16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(c), 0));
}

// Words p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Words spread_over(const uint16_t* p) {
  if constexpr (K >= W) {
    return all(*p);
  } else if constexpr (K == 16) {
    int32_t two;
    std::memcpy(&two, p, sizeof two);
    const Words lanes =
        _mm512_set_epi64(0x0302030203020302, 0x0302030203020302, 0x0302030203020302, 0x0302030203020302,
                         0x0100010001000100, 0x0100010001000100, 0x0100010001000100, 0x0100010001000100);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(two), lanes);
  } else if constexpr (K == 8) {
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    const Words lanes =
        _mm512_set_epi64(0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
                         0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(four), lanes);
  } else if constexpr (K == 4) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const Words lanes =
        _mm512_set_epi64(0x0F0E0F0E0F0E0F0E, 0x0D0C0D0C0D0C0D0C, 0x0B0A0B0A0B0A0B0A, 0x0908090809080908,
                         0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(eight), lanes);
  } else {
    const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const Words wide = _mm512_cvtepu16_epi32(sixteen);
    return _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  }
}

#include "trellis_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
