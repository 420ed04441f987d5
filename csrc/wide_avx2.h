// Eight floats at a time, with gathers and halves. Included inside a namespace and a target region of "avx2,fma,f16c".
constexpr int L = 8;  // lanes
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));

PALEY_INLINE F all(float a) { return (F)_mm256_set1_ps(a); }
PALEY_INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PALEY_INLINE F greatest(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
PALEY_INLINE F root(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
PALEY_INLINE F to_float(I a) { return (F)_mm256_cvtepi32_ps((__m256i)a); }

// points[at]: of sixteen, or of any number.
PALEY_INLINE F pick_of_16(const float* points, I at) {
  const __m256i i = (__m256i)at;
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(points), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(points + 8), i);
  return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
PALEY_INLINE F pick(const float* points, I at) { return (F)_mm256_i32gather_ps(points, (__m256i)at, 4); }

PALEY_INLINE float sum(F a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
// The sum of each of four vectors.
PALEY_INLINE void sums(F a, F b, F c, F d, float* to) {
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

PALEY_INLINE F from_half(const uint16_t* p) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PALEY_INLINE void to_half(F a, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
}
PALEY_INLINE F from_bfloat(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
PALEY_INLINE float one_from_half(uint16_t x) { return _cvtsh_ss(x); }
PALEY_INLINE uint16_t one_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

#include "wide_eight.h"
