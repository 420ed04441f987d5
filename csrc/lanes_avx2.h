// Eight floats at a time. Included inside a namespace and a target region; see nearest_avx2.cpp.
constexpr int W = 8;
using Floats = __m256;
using Ints = __m256i;
using Mask = __m256;

PALEY_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
PALEY_INLINE Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PALEY_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
PALEY_INLINE void store(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
PALEY_INLINE Floats all(float a) { return _mm256_set1_ps(a); }
PALEY_INLINE Ints all(int32_t a) { return _mm256_set1_epi32(a); }
PALEY_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
PALEY_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
PALEY_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
PALEY_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
PALEY_INLINE Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
PALEY_INLINE Mask greater(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
PALEY_INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
PALEY_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }

PALEY_INLINE Mask is_nan(Floats a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
PALEY_INLINE float greatest(Floats a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
PALEY_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }

// table[at] of each lane; the first has sixteen entries.
PALEY_INLINE Floats pick_of_16(const float* table, Ints at) {
  const Floats low = _mm256_permutevar8x32_ps(load(table), at), high = _mm256_permutevar8x32_ps(load(table + 8), at);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}
PALEY_INLINE Floats pick(const float* table, Ints at) { return _mm256_i32gather_ps(table, at, 4); }

using Doubles = __m256d;
PALEY_INLINE Doubles load(const double* p) { return _mm256_loadu_pd(p); }
PALEY_INLINE void store(double* p, Doubles a) { _mm256_storeu_pd(p, a); }
PALEY_INLINE Doubles all(double a) { return _mm256_set1_pd(a); }
PALEY_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }

// Writes the lanes of `which` side by side. -> how many.
template <class T, class Lanes>
PALEY_INLINE int keep(T* p, Lanes a, uint32_t which) {
  T lanes[W];
  store(lanes, a);
  int count = 0;
  for (; which; which &= which - 1) p[count++] = lanes[lowest_bit(which)];
  return count;
}
