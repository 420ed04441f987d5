// How codes become integers in vectors of 32 bytes: eight rows, four bytes of each. Included inside a namespace by the
// levels that have them; what the integers are multiplied by is the level's.

PALEY_INLINE __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PALEY_INLINE __m256i twice(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PALEY_INLINE __m256i low_bits(__m256i x, int count) {
  return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>((1 << count) - 1)));
}
template <int COUNT>
PALEY_INLINE __m256i right(__m256i x) {
  if constexpr (COUNT == 0) return x;
  return _mm256_srli_epi16(x, COUNT);
}
// Bit BIT of each byte as its highest one.
template <int BIT>
PALEY_INLINE __m256i to_top(__m256i x) {
  if constexpr (BIT == 7) return x;
  return _mm256_slli_epi16(x, 7 - BIT);
}

// The entries of a table of SIXTEENS times 16 bytes; the index: `low` in 0..15, and the bits from 4 on of `high`.
template <int SIXTEENS>
PALEY_INLINE __m256i pick(const __m256i* table, __m256i low, const __m256i (&tops)[4]) {
  if constexpr (SIXTEENS == 1) {
    return _mm256_shuffle_epi8(table[0], low);
  } else {
    constexpr int HALF = SIXTEENS / 2, BIT = HALF == 8 ? 3 : HALF == 4 ? 2 : HALF == 2 ? 1 : 0;
    return _mm256_blendv_epi8(pick<HALF>(table, low, tops), pick<HALF>(table + HALF, low, tops), tops[BIT]);
  }
}

struct CodeTables {
  __m256i first, second;  // a table of 16 points, or of four: by an index's lower bits, by its upper ones
  __m256i sixteens[2][16];
  __m256i halves[2][8];  // TRELLIS: by the lower and the upper half of a state, 64 entries of each value
  const int* look;
  const uint8_t* points;

  CodeTables(Kind kind, const uint8_t* table) : look(reinterpret_cast<const int*>(table)), points(table) {
    first = second = _mm256_setzero_si256();
    if (kind <= PALEY_TABLE4) first = biased(twice(table));
    if (kind == PALEY_TABLE2) second = by_upper(first);
    if (kind >= PALEY_PAIRS4 && kind <= PALEY_PAIRS8) {
      const int count = kind == PALEY_PAIRS4 ? 1 : kind == PALEY_PAIRS6 ? 4 : 16;
      for (int i = 0; i < 2 * count; ++i) sixteens[i / count][i % count] = biased(twice(table + 16 * i));
    }
    for (int i = 0; i < 4 && kind == PALEY_TABLE6; ++i) sixteens[0][i] = biased(twice(table + 16 * i));
    for (int i = 0; i < 16 && is_trellis(kind); ++i) {
      halves[i / 4 % 2][i / 8 * 4 + i % 4] = twice(table + 16 * i);
      if (i < 8) sixteens[0][i] = biased(twice(table + 256 + 16 * i));
    }
  }

  // The index's bits 2 and 3 -> its bits 0 and 1.
  static PALEY_INLINE __m256i by_upper(__m256i table) {
    const __m256i quarters = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2,
                                              2, 2, 2, 3, 3, 3, 3);
    return _mm256_shuffle_epi8(table, quarters);
  }
  void own(const uint8_t* at) { points = at; }

  static PALEY_INLINE __m256i biased(__m256i x) {
    return BIAS ? _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(0x80))) : x;
  }
  template <bool FINE>
  static PALEY_INLINE __m256i biased_unless(__m256i x) {
    return FINE ? x : biased(x);
  }
};

PALEY_INLINE __m256i eight(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// Dword D of eight rows, whose first one's codes `block` has.
template <Kind KIND, int D>
PALEY_INLINE __m256i look(const int* table, const uint8_t* block) {
  constexpr int HIGH = look_high(KIND), BITS = D * HIGH;
  __m256i codes = eight(block + D * 16);
  if constexpr (HIGH > 0) {
    __m256i high = _mm256_slli_epi32(eight(block + 128 + BITS / 8 * 16), 8);
    high = _mm256_and_si256(_mm256_srli_epi32(high, BITS % 8), _mm256_set1_epi32(((1 << HIGH) - 1) << 8));
    codes = _mm256_or_si256(codes, high);
  }
  return _mm256_i32gather_epi32(table, codes, 4);
}

// Dword D of eight rows, part V; see matmul_trellis.h.
template <Kind KIND, bool FINE, int PLANE, int V>
PALEY_INLINE __m256i stream_of(const uint8_t* block) {
  using S = Stream<KIND, FINE>;
  const uint8_t* at = block + S::at(PLANE);
  if constexpr (!S::short_plane(PLANE)) return load_bytes(at + 32 * V);
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * V)));
  return PLANE < 0 ? words : _mm256_slli_epi32(words, 16);
}
// Six bits of the state of column I as byte I.
template <Kind KIND, bool FINE, int D, int MORE, int I>
PALEY_INLINE __m256i bits_of(__m256i window) {
  constexpr int RIGHT = Stream<KIND, FINE>::shift(D, I) + MORE - 8 * I;
  if constexpr (RIGHT > 0) {
    window = _mm256_srli_epi32(window, RIGHT);
  } else if constexpr (RIGHT < 0) {
    window = _mm256_slli_epi32(window, -RIGHT);
  }
  return _mm256_and_si256(window, _mm256_set1_epi32(63u << 8 * I));
}
template <Kind KIND, bool FINE, int D, int MORE>
PALEY_INLINE __m256i all_bits_of(__m256i window) {
  return _mm256_or_si256(
      _mm256_or_si256(bits_of<KIND, FINE, D, MORE, 0>(window), bits_of<KIND, FINE, D, MORE, 1>(window)),
      _mm256_or_si256(bits_of<KIND, FINE, D, MORE, 2>(window), bits_of<KIND, FINE, D, MORE, 3>(window)));
}
template <Kind KIND>
PALEY_INLINE __m256i of_half(const __m256i* lists, __m256i bits) {
  const __m256i low = low_bits(bits, 4), tops[4] = {to_top<4>(bits), to_top<5>(bits)};
  const __m256i first = pick<4>(lists, low, tops);
  if constexpr (trellis_p(KIND) == 1) return first;
  return _mm256_blendv_epi8(first, pick<4>(lists + 4, low, tops), _mm256_set1_epi16(static_cast<short>(0xFF00)));
}
template <Kind KIND, bool FINE, int D, int V>
PALEY_INLINE __m256i trellis(const CodeTables& tables, const uint8_t* block) {
  using S = Stream<KIND, FINE>;
  constexpr int PLANE = S::plane(D);
  __m256i window = stream_of<KIND, FINE, PLANE, V>(block);
  if constexpr (S::in_two(D)) {
    const __m256i after = stream_of<KIND, FINE, PLANE + 1, V>(block);
    window = _mm256_or_si256(_mm256_slli_epi32(window, S::offset(D)), _mm256_srli_epi32(after, 32 - S::offset(D)));
  }
  const __m256i place = _mm256_add_epi8(of_half<KIND>(tables.halves[0], all_bits_of<KIND, FINE, D, 0>(window)),
                                        of_half<KIND>(tables.halves[1], all_bits_of<KIND, FINE, D, 6>(window)));
  const __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), place), at = _mm256_xor_si256(place, upper);
  const __m256i tops[4] = {to_top<4>(at), to_top<5>(at), to_top<6>(at)};
  const __m256i found = pick<8>(tables.sixteens[0], at, tops);
  return _mm256_sub_epi8(_mm256_xor_si256(found, upper), upper);  // also of biased ones
}

// Two dwords of eight rows: STEP and part V of a block.
template <Kind KIND, bool FINE, int STEP, int V>
PALEY_INLINE void decode_at(const CodeTables& tables, const uint8_t* block, __m256i& w0, __m256i& w1) {
  if constexpr (KIND == PALEY_TABLE4) {
    const __m256i codes = load_bytes(block + STEP * 64 + V * 32);
    w0 = _mm256_shuffle_epi8(tables.first, low_bits(codes, 4));
    w1 = _mm256_shuffle_epi8(tables.first, low_bits(right<4>(codes), 4));
  } else if constexpr (KIND == PALEY_TABLE6) {
    const __m256i codes = load_bytes(block + STEP * 64 + V * 32);
    const __m256i high = right<4 * (STEP % 2)>(load_bytes(block + 256 + STEP / 2 * 64 + V * 32));
    const __m256i even[4] = {to_top<0>(high), to_top<1>(high)}, odd[4] = {to_top<2>(high), to_top<3>(high)};
    w0 = pick<4>(tables.sixteens[0], low_bits(codes, 4), even);
    w1 = pick<4>(tables.sixteens[0], low_bits(right<4>(codes), 4), odd);
  } else if constexpr (KIND == PALEY_TABLE2) {
    const __m256i codes = low_bits(right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64 + V * 32)), 4);
    w0 = _mm256_shuffle_epi8(tables.first, codes);
    w1 = _mm256_shuffle_epi8(tables.second, codes);
  } else if constexpr (KIND == PALEY_TABLE3) {
    const __m256i codes = right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64 + V * 32));
    const __m256i high = load_bytes(block + 128 + V * 32);
    const __m256i four = _mm256_set1_epi8(4);
    const __m256i even = STEP == 0 ? _mm256_slli_epi16(high, 2) : right<(STEP ? 2 * STEP - 2 : 0)>(high);
    const __m256i odd = STEP == 0 ? _mm256_slli_epi16(high, 1) : right<(STEP ? 2 * STEP - 1 : 0)>(high);
    w0 = _mm256_shuffle_epi8(tables.first, _mm256_or_si256(low_bits(codes, 2), _mm256_and_si256(even, four)));
    w1 = _mm256_shuffle_epi8(tables.first, _mm256_or_si256(low_bits(right<2>(codes), 2), _mm256_and_si256(odd, four)));
  } else if constexpr (KIND == PALEY_OWN2) {
    const __m256i rows = _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 0, 0, 0, 0, 4, 4, 4, 4, 8,
                                          8, 8, 8, 12, 12, 12, 12);
    const __m256i codes = right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64 + V * 32));
    const __m256i table = CodeTables::biased(load_bytes(tables.points + 32 * V));
    w0 = _mm256_shuffle_epi8(table, _mm256_or_si256(low_bits(codes, 2), rows));
    w1 = _mm256_shuffle_epi8(table, _mm256_or_si256(low_bits(right<2>(codes), 2), rows));
  } else if constexpr (KIND == PALEY_PAIRS4 || KIND == PALEY_PAIRS6 || KIND == PALEY_PAIRS8) {
    constexpr int SIXTEENS = KIND == PALEY_PAIRS4 ? 1 : KIND == PALEY_PAIRS6 ? 4 : 16;
    __m256i codes, tops[4];
    if constexpr (KIND == PALEY_PAIRS8) {
      codes = load_bytes(block + STEP * 64 + V * 32);
      tops[0] = to_top<4>(codes), tops[1] = to_top<5>(codes), tops[2] = to_top<6>(codes), tops[3] = codes;
    } else {
      codes = right<4 * (STEP % 2)>(load_bytes(block + STEP / 2 * 64 + V * 32));
      if constexpr (KIND == PALEY_PAIRS6) {
        const __m256i high = load_bytes(block + 128 + V * 32);
        tops[0] = to_top<2 * STEP>(high), tops[1] = to_top<2 * STEP + 1>(high);
      }
    }
    codes = low_bits(codes, 4);
    const __m256i a = pick<SIXTEENS>(tables.sixteens[0], codes, tops);
    const __m256i b = pick<SIXTEENS>(tables.sixteens[1], codes, tops);
    w0 = _mm256_unpacklo_epi8(a, b);
    w1 = _mm256_unpackhi_epi8(a, b);
  } else if constexpr (is_look(KIND)) {
    w0 = CodeTables::biased_unless<FINE>(look<KIND, 2 * STEP>(tables.look, block + V * 8));
    w1 = CodeTables::biased_unless<FINE>(look<KIND, 2 * STEP + 1>(tables.look, block + V * 8));
  } else if constexpr (is_trellis(KIND)) {
    if constexpr (FINE) {
      const __m256i four = CodeTables::biased(trellis<KIND, FINE, STEP, V>(tables, block));
      const __m256i first = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
      const __m256i last = _mm256_or_si256(first, _mm256_set1_epi8(2));
      w0 = _mm256_srai_epi16(_mm256_shuffle_epi8(four, first), 8);
      w1 = _mm256_srai_epi16(_mm256_shuffle_epi8(four, last), 8);
    } else {
      w0 = trellis<KIND, FINE, 2 * STEP, V>(tables, block);
      w1 = trellis<KIND, FINE, 2 * STEP + 1, V>(tables, block);
    }
  } else if constexpr (KIND == PALEY_BYTES && FINE) {
    w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2 * STEP * 32 + V * 16)));
    w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + (2 * STEP + 1) * 32 + V * 16)));
  } else {
    w0 = CodeTables::biased_unless<FINE>(load_bytes(block + 2 * STEP * 64 + V * 32));
    w1 = CodeTables::biased_unless<FINE>(load_bytes(block + (2 * STEP + 1) * 64 + V * 32));
  }
}
