// Sixteen floats at a time. Included inside a namespace and a target region of "avx512f,avx512bw"; see wide_avx2.h.
constexpr int L = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

PALEY_INLINE F all(float a) { return (F)_mm512_set1_ps(a); }
PALEY_INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
PALEY_INLINE F greatest(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
PALEY_INLINE F root(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
PALEY_INLINE F to_float(I a) { return (F)_mm512_cvtepi32_ps((__m512i)a); }

// points[at]: of sixteen, by the lowest four bits of `at`, or of any number.
PALEY_INLINE F pick_of_16(const float* points, I at) {
  return (F)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(points));
}
PALEY_INLINE F pick_of_16(F points, I at) { return (F)_mm512_permutexvar_ps((__m512i)at, (__m512)points); }
PALEY_INLINE F pick(const float* points, I at) { return (F)_mm512_i32gather_ps((__m512i)at, points, 4); }

PALEY_INLINE float sum(F a) {
  const __m512 b = _mm512_add_ps((__m512)a, _mm512_shuffle_f32x4((__m512)a, (__m512)a, 0x4e));
  __m128 c = _mm_add_ps(_mm512_castps512_ps128(b), _mm512_castps512_ps128(_mm512_shuffle_f32x4(b, b, 0xb1)));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// Quarters, whose sum is that of each of four vectors.
PALEY_INLINE __m512 quarters(const F* a) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[0], (__m512)a[1]),
                                  _mm512_unpackhi_ps((__m512)a[0], (__m512)a[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2], (__m512)a[3]),
                                  _mm512_unpackhi_ps((__m512)a[2], (__m512)a[3]));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
// The sums of four vectors of each of R rows, `stride` floats apart; they are added alike for any R.
template <int R>
PALEY_INLINE void sums(const F (&a)[R][4], float* to, int64_t stride) {
  if constexpr (R == 4) {
    const __m512 x = quarters(a[0]), y = quarters(a[1]), z = quarters(a[2]), w = quarters(a[3]);
    const __m512 xy = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    const __m512 zw = _mm512_add_ps(_mm512_shuffle_f32x4(z, w, 0x44), _mm512_shuffle_f32x4(z, w, 0xee));
    const __m512 found = _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xdd));
    _mm_storeu_ps(to, _mm512_castps512_ps128(found));
    _mm_storeu_ps(to + stride, _mm512_extractf32x4_ps(found, 1));
    _mm_storeu_ps(to + 2 * stride, _mm512_extractf32x4_ps(found, 2));
    _mm_storeu_ps(to + 3 * stride, _mm512_extractf32x4_ps(found, 3));
  } else {
    for (int r = 0; r < R; ++r) {
      const __m512 x = quarters(a[r]), half = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xee));
      _mm_storeu_ps(to + r * stride, _mm_add_ps(_mm512_castps512_ps128(half), _mm512_extractf32x4_ps(half, 1)));
    }
  }
}

PALEY_INLINE F from_half(const uint16_t* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PALEY_INLINE void to_half(F a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
}
PALEY_INLINE F from_bfloat(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
PALEY_INLINE float one_from_half(uint16_t x) { return _cvtsh_ss(x); }
PALEY_INLINE uint16_t one_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

// The next L codes of B bits of a stream, from bit 0 of each lane on; above them may be others if B is 4 or less.
template <int B>
PALEY_INLINE I next_codes(const uint8_t* from) {
  if constexpr (B <= 4) {
    const __m512i shifts = _mm512_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B,
                                             0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
    int32_t a, b;
    std::memcpy(&a, from, sizeof a);
    std::memcpy(&b, from + B, sizeof b);
    const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(a), 0xff00, b);
    return (I)_mm512_srlv_epi32(words, shifts);
  } else {
    const __m512i shifts = _mm512_setr_epi64(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
    const __m512i most = _mm512_set1_epi64((1 << B) - 1);
    int64_t a, b;
    std::memcpy(&a, from, sizeof a);
    std::memcpy(&b, from + B, sizeof b);
    const __m256i low = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(a), shifts), most));
    const __m256i high = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(b), shifts), most));
    return (I)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
}

PALEY_INLINE F choose(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }

#include "wide_power.h"

// exp to 2 units in the last place, 0 below -87.3; NaN stays.
PALEY_INLINE F exponential(F x) {
  const __m512 v = (__m512)x, low = _mm512_set1_ps(-87.3f);
  const __m512 y = _mm512_max_ps(low, v);  // the second one if it is NaN
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 some = _mm512_cmp_ps_mask(v, low, _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(some, (__m512)power_within((F)whole, (F)y), whole);
}
