// Floats and sums of eight rows. Included inside a namespace after matmul_avx2.h.

// The arguments are constants where this is inlined.
template <Kind KIND, bool FINE>
PALEY_INLINE void decode_any(const CodeTables& tables, const uint8_t* block, int step, int v, __m256i& w0,
                             __m256i& w1) {
  switch (2 * step + v) {
    case 0: return decode_at<KIND, FINE, 0, 0>(tables, block, w0, w1);
    case 1: return decode_at<KIND, FINE, 0, 1>(tables, block, w0, w1);
    case 2: return decode_at<KIND, FINE, 1, 0>(tables, block, w0, w1);
    case 3: return decode_at<KIND, FINE, 1, 1>(tables, block, w0, w1);
    case 4: return decode_at<KIND, FINE, 2, 0>(tables, block, w0, w1);
    case 5: return decode_at<KIND, FINE, 2, 1>(tables, block, w0, w1);
    case 6: return decode_at<KIND, FINE, 3, 0>(tables, block, w0, w1);
    default: return decode_at<KIND, FINE, 3, 1>(tables, block, w0, w1);
  }
}

struct FloatLanes {
  using Ints = __m256i;
  using Floats = __m256;

  static PALEY_INLINE Ints none() { return _mm256_setzero_si256(); }
  static PALEY_INLINE Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static PALEY_INLINE Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static PALEY_INLINE Ints load(const uint8_t* p) { return load_bytes(p); }
  static PALEY_INLINE void store(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static PALEY_INLINE void store(uint8_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static PALEY_INLINE Ints less(Ints sums, int32_t by) { return _mm256_sub_epi32(sums, _mm256_set1_epi32(by)); }
  // sums - (zeros + bias) * sum
  static PALEY_INLINE Ints less_zeros(Ints sums, const uint8_t* zeros, int32_t bias, int32_t sum) {
    Ints by = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    by = _mm256_add_epi32(by, _mm256_set1_epi32(bias));
    return _mm256_sub_epi32(sums, _mm256_mullo_epi32(by, _mm256_set1_epi32(sum)));
  }
  static PALEY_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
  static PALEY_INLINE Floats zeros() { return _mm256_setzero_ps(); }
  static PALEY_INLINE Floats all(float a) { return _mm256_set1_ps(a); }
  static PALEY_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static PALEY_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static PALEY_INLINE Floats load_halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static PALEY_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static PALEY_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
};
