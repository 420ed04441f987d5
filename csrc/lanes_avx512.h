// Sixteen floats at a time. Included inside a namespace and a target region; see nearest_avx512.cpp.
constexpr int W = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

PALEY_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
PALEY_INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
PALEY_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
PALEY_INLINE void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
PALEY_INLINE Floats all(float a) { return _mm512_set1_ps(a); }
PALEY_INLINE Ints all(int32_t a) { return _mm512_set1_epi32(a); }
PALEY_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
PALEY_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
PALEY_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
PALEY_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
PALEY_INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
PALEY_INLINE Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
PALEY_INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, m, yes); }
PALEY_INLINE uint32_t bits(Mask m) { return m; }

PALEY_INLINE Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
PALEY_INLINE float greatest(Floats a) { return _mm512_reduce_max_ps(a); }
PALEY_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

// table[at] of each lane; the first has sixteen entries.
PALEY_INLINE Floats pick_of_16(const float* table, Ints at) { return _mm512_permutexvar_ps(at, load(table)); }
PALEY_INLINE Floats pick(const float* table, Ints at) { return _mm512_i32gather_ps(at, table, 4); }

using Doubles = __m512d;
PALEY_INLINE Doubles load(const double* p) { return _mm512_loadu_pd(p); }
PALEY_INLINE void store(double* p, Doubles a) { _mm512_storeu_pd(p, a); }
PALEY_INLINE Doubles all(double a) { return _mm512_set1_pd(a); }
PALEY_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }

// Writes the lanes of `which` side by side, and anything after them, W in all. -> how many.
PALEY_INLINE int keep(float* p, Floats a, uint32_t which) {
  store(p, _mm512_maskz_compress_ps(static_cast<Mask>(which), a));
  return __builtin_popcount(which);
}
PALEY_INLINE int keep(int32_t* p, Ints a, uint32_t which) {
  store(p, _mm512_maskz_compress_epi32(static_cast<Mask>(which), a));
  return __builtin_popcount(which);
}
