// How codes become integers in vectors of 64 bytes: 16 rows, four bytes of each. Included inside a namespace by the
// levels that have them. Bytes have a bias of 128, as vpdpbusd reads one side without signs.

constexpr int BIAS = 128;

PALEY_INLINE __m512i load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
PALEY_INLINE __m128i load_rows(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
PALEY_INLINE __m512i low_bits(__m512i x, int count) {
  return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>((1 << count) - 1)));
}
template <int COUNT>
PALEY_INLINE __m512i right(__m512i x) {
  if constexpr (COUNT == 0) return x;
  return _mm512_srli_epi16(x, COUNT);
}

struct CodeTables {
  __m512i first, second;  // a table of 16 points, or of four: by an index's lower bits, by its upper ones
  __m512i wide[2][4];     // of each value of a pair: 16 points four times, 64, or 256; TRELLIS: half of the points
  __m512i halves[4];      // TRELLIS: by the lower and the upper half of a state, of each value
  const int* look;
  const uint8_t* points;

  CodeTables(Kind kind, const uint8_t* table) : look(reinterpret_cast<const int*>(table)), points(table) {
    first = second = _mm512_setzero_si512();
    if (kind <= PALEY_TABLE4) first = biased(_mm512_broadcast_i32x4(load_rows(table)));
    if (kind == PALEY_TABLE2) {  // the index's bits 2 and 3 -> its bits 0 and 1
      const __m128i quarters = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      second = _mm512_shuffle_epi8(first, _mm512_broadcast_i32x4(quarters));
    }
    if (kind == PALEY_TABLE6) wide[0][0] = biased(load_bytes(table));
    for (int i = 0; i < 2; ++i) {
      if (kind == PALEY_PAIRS4) wide[i][0] = biased(_mm512_broadcast_i32x4(load_rows(table + 16 * i)));
      if (kind == PALEY_PAIRS6) wide[i][0] = biased(load_bytes(table + 64 * i));
      if (kind == PALEY_PAIRS8) {
        for (int k = 0; k < 4; ++k) wide[i][k] = biased(load_bytes(table + 256 * i + 64 * k));
      }
    }
    for (int k = 0; k < 4 && is_trellis(kind); ++k) {
      halves[k] = load_bytes(table + 64 * k);
      if (k < 2) wide[0][k] = biased(load_bytes(table + 256 + 64 * k));
    }
  }
  void own(const uint8_t* at) { points = at; }

  template <Kind KIND>
  PALEY_INLINE __m512i value(__m512i low, __m512i high) const {
    __m512i place = _mm512_permutexvar_epi8(low, halves[0]), more = _mm512_permutexvar_epi8(high, halves[1]);
    if constexpr (trellis_p(KIND) == 2) {
      constexpr __mmask64 SECOND = 0xAAAAAAAAAAAAAAAA;
      place = _mm512_mask_permutexvar_epi8(place, SECOND, low, halves[2]);
      more = _mm512_mask_permutexvar_epi8(more, SECOND, high, halves[3]);
    }
    place = _mm512_add_epi8(place, more);
    const __mmask64 upper = _mm512_movepi8_mask(place);
    place = _mm512_mask_sub_epi8(place, upper, _mm512_set1_epi8(-1), place);
    const __m512i found = _mm512_permutex2var_epi8(wide[0][0], place, wide[0][1]);
    return _mm512_mask_sub_epi8(found, upper, _mm512_setzero_si512(), found);  // also of biased ones
  }

  static PALEY_INLINE __m512i biased(__m512i x) {
    return _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  template <bool FINE>
  static PALEY_INLINE __m512i biased_unless(__m512i x) {
    return FINE ? x : biased(x);
  }

  template <Kind KIND>
  PALEY_INLINE __m512i pick(int i, __m512i codes) const {
    if constexpr (KIND == PALEY_PAIRS4) return _mm512_shuffle_epi8(wide[i][0], codes);
    if constexpr (KIND == PALEY_PAIRS6) return _mm512_permutexvar_epi8(codes, wide[i][0]);
    const __m512i low = _mm512_permutex2var_epi8(wide[i][0], codes, wide[i][1]);
    const __m512i high = _mm512_permutex2var_epi8(wide[i][2], codes, wide[i][3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
  }
};

// Dword D of 16 rows.
template <Kind KIND, int D>
PALEY_INLINE __m512i look(const int* table, const uint8_t* block) {
  constexpr int HIGH = look_high(KIND), BITS = D * HIGH;
  __m512i codes = _mm512_cvtepu8_epi32(load_rows(block + D * 16));
  if constexpr (HIGH > 0) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu8_epi32(load_rows(block + 128 + BITS / 8 * 16)), 8);
    high = _mm512_and_si512(_mm512_srli_epi32(high, BITS % 8), _mm512_set1_epi32(((1 << HIGH) - 1) << 8));
    codes = _mm512_or_si512(codes, high);
  }
  return _mm512_i32gather_epi32(codes, table, 4);
}

// Dword D of 16 rows; see matmul_trellis.h.
template <Kind KIND, bool FINE, int PLANE>
PALEY_INLINE __m512i stream_of(const uint8_t* block) {
  using S = Stream<KIND, FINE>;
  const uint8_t* at = block + S::at(PLANE);
  if constexpr (!S::short_plane(PLANE)) return load_bytes(at);
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return PLANE < 0 ? words : _mm512_slli_epi32(words, 16);
}
template <Kind KIND, bool FINE, int D, int MORE>
PALEY_INLINE __m512i bits_of(__m512i window) {
  using S = Stream<KIND, FINE>;
  constexpr auto shift = [](int i) { return static_cast<long long>(S::shift(D, i % 4) + MORE + i / 4 * 32) << 8 * i; };
  constexpr long long SHIFTS = shift(0) | shift(1) | shift(2) | shift(3) | shift(4) | shift(5) | shift(6) | shift(7);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(SHIFTS), window);
}
template <Kind KIND, bool FINE, int D>
PALEY_INLINE __m512i trellis(const CodeTables& tables, const uint8_t* block) {
  using S = Stream<KIND, FINE>;
  constexpr int PLANE = S::plane(D);
  __m512i window = stream_of<KIND, FINE, PLANE>(block);
  if constexpr (S::in_two(D)) {
    window = _mm512_shldi_epi32(window, stream_of<KIND, FINE, PLANE + 1>(block), S::offset(D));
  }
  // Permutations read six bits of an index.
  return tables.value<KIND>(bits_of<KIND, FINE, D, 0>(window), bits_of<KIND, FINE, D, 6>(window));
}

// Two dwords of 16 rows: STEP of a block.
template <Kind KIND, bool FINE, int STEP>
PALEY_INLINE void decode_at(const CodeTables& tables, const uint8_t* block, __m512i& w0, __m512i& w1) {
  if constexpr (KIND == PALEY_TABLE4) {
    const __m512i codes = load_bytes(block + STEP * 64);
    w0 = _mm512_shuffle_epi8(tables.first, low_bits(codes, 4));
    w1 = _mm512_shuffle_epi8(tables.first, low_bits(right<4>(codes), 4));
  } else if constexpr (KIND == PALEY_TABLE6) {  // permutations read the lower six bits of an index
    const __m512i codes = load_bytes(block + STEP * 64), high = load_bytes(block + 256 + STEP / 2 * 64);
    const __m512i even = STEP % 2 ? high : _mm512_slli_epi16(high, 4);
    const __m512i odd = STEP % 2 ? right<2>(high) : _mm512_slli_epi16(high, 2);
    const __m512i low = _mm512_set1_epi8(15);
    constexpr int FIRST_OR_SECOND = 0xCA;  // by the bits of `low`
    w0 = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(low, codes, even, FIRST_OR_SECOND), tables.wide[0][0]);
    w1 = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(low, right<4>(codes), odd, FIRST_OR_SECOND),
                                 tables.wide[0][0]);
  } else if constexpr (KIND == PALEY_TABLE2) {
    const __m512i codes = low_bits(right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64)), 4);
    w0 = _mm512_shuffle_epi8(tables.first, codes);
    w1 = _mm512_shuffle_epi8(tables.second, codes);
  } else if constexpr (KIND == PALEY_TABLE3) {
    const __m512i codes = right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64)), high = load_bytes(block + 128);
    const __m512i four = _mm512_set1_epi8(4);
    const __m512i even = STEP == 0 ? _mm512_slli_epi16(high, 2) : right<(STEP ? 2 * STEP - 2 : 0)>(high);
    const __m512i odd = STEP == 0 ? _mm512_slli_epi16(high, 1) : right<(STEP ? 2 * STEP - 1 : 0)>(high);
    w0 = _mm512_shuffle_epi8(tables.first, _mm512_or_si512(low_bits(codes, 2), _mm512_and_si512(even, four)));
    w1 = _mm512_shuffle_epi8(tables.first, _mm512_or_si512(low_bits(right<2>(codes), 2), _mm512_and_si512(odd, four)));
  } else if constexpr (KIND == PALEY_OWN2) {
    const __m128i of_rows = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    const __m512i rows = _mm512_broadcast_i32x4(of_rows), table = CodeTables::biased(load_bytes(tables.points));
    const __m512i codes = right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64));
    w0 = _mm512_shuffle_epi8(table, _mm512_or_si512(low_bits(codes, 2), rows));
    w1 = _mm512_shuffle_epi8(table, _mm512_or_si512(low_bits(right<2>(codes), 2), rows));
  } else if constexpr (KIND == PALEY_PAIRS4 || KIND == PALEY_PAIRS6 || KIND == PALEY_PAIRS8) {
    __m512i codes;
    if constexpr (KIND == PALEY_PAIRS8) {
      codes = load_bytes(block + STEP * 64);
    } else {
      codes = low_bits(right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64)), 4);
    }
    if constexpr (KIND == PALEY_PAIRS6) {
      const __m512i high = low_bits(right<2 * STEP>(load_bytes(block + 128)), 2);
      codes = _mm512_or_si512(codes, _mm512_slli_epi16(high, 4));
    }
    const __m512i a = tables.pick<KIND>(0, codes), b = tables.pick<KIND>(1, codes);
    w0 = _mm512_unpacklo_epi8(a, b);
    w1 = _mm512_unpackhi_epi8(a, b);
  } else if constexpr (is_look(KIND)) {
    w0 = CodeTables::biased_unless<FINE>(look<KIND, 2 * STEP>(tables.look, block));
    w1 = CodeTables::biased_unless<FINE>(look<KIND, 2 * STEP + 1>(tables.look, block));
  } else if constexpr (is_trellis(KIND)) {
    if constexpr (FINE) {
      const __m512i four = CodeTables::biased(trellis<KIND, FINE, STEP>(tables, block));
      const __m128i pair = _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
      const __m512i first = _mm512_broadcast_i32x4(pair), last = _mm512_or_si512(first, _mm512_set1_epi8(2));
      w0 = _mm512_srai_epi16(_mm512_shuffle_epi8(four, first), 8);
      w1 = _mm512_srai_epi16(_mm512_shuffle_epi8(four, last), 8);
    } else {
      w0 = trellis<KIND, FINE, 2 * STEP>(tables, block);
      w1 = trellis<KIND, FINE, 2 * STEP + 1>(tables, block);
    }
  } else if constexpr (KIND == PALEY_BYTES && FINE) {
    w0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2 * STEP * 32)));
    w1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + (2 * STEP + 1) * 32)));
  } else {
    w0 = CodeTables::biased_unless<FINE>(load_bytes(block + 2 * STEP * 64));
    w1 = CodeTables::biased_unless<FINE>(load_bytes(block + (2 * STEP + 1) * 64));
  }
}

// Products by VNNI.
struct VnniLanes {
  static constexpr int WIDTH = 16, VECTORS = 1, CHAINS = 2, BIAS = 128;
  using Ints = __m512i;
  using Floats = __m512;
  using Tables = CodeTables;
  using Values = __m512i;

  static PALEY_INLINE Values all(const uint8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static PALEY_INLINE Ints dot_bytes(Ints sum, Ints w, Values x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static PALEY_INLINE Ints dot_words(Ints sum, Ints w, Values x) { return _mm512_dpwssd_epi32(sum, w, x); }

  // `step` is a constant where this is inlined.
  template <Kind KIND, bool FINE>
  static PALEY_INLINE void decode(const Tables& tables, const uint8_t* block, int step, int, Ints& w0, Ints& w1) {
    switch (step) {
      case 0: return decode_at<KIND, FINE, 0>(tables, block, w0, w1);
      case 1: return decode_at<KIND, FINE, 1>(tables, block, w0, w1);
      case 2: return decode_at<KIND, FINE, 2>(tables, block, w0, w1);
      default: return decode_at<KIND, FINE, 3>(tables, block, w0, w1);
    }
  }

  static PALEY_INLINE Ints none() { return _mm512_setzero_si512(); }
  static PALEY_INLINE Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static PALEY_INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static PALEY_INLINE Ints load(const uint8_t* p) { return load_bytes(p); }
  static PALEY_INLINE void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
  static PALEY_INLINE void store(uint8_t* p, Ints a) { _mm512_storeu_si512(p, a); }
  static PALEY_INLINE Ints less(Ints sums, int32_t by) { return _mm512_sub_epi32(sums, _mm512_set1_epi32(by)); }
  // sums - (zeros + bias) * sum
  static PALEY_INLINE Ints less_zeros(Ints sums, const uint8_t* zeros, int32_t bias, int32_t sum) {
    const Ints by = _mm512_add_epi32(_mm512_cvtepu8_epi32(load_rows(zeros)), _mm512_set1_epi32(bias));
    return _mm512_sub_epi32(sums, _mm512_mullo_epi32(by, _mm512_set1_epi32(sum)));
  }
  static PALEY_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
  static PALEY_INLINE Floats zeros() { return _mm512_setzero_ps(); }
  static PALEY_INLINE Floats all(float a) { return _mm512_set1_ps(a); }
  static PALEY_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static PALEY_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static PALEY_INLINE Floats load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static PALEY_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static PALEY_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
};
