// The three ways to S, Q and R of planes_avx512.h with half as wide registers and older instructions. Included by
// planes_avx2.cpp.

// S, Q, and both, of eight rows.
template <int MAPS>
PALEY_INLINE void load_maps(const uint8_t* record, int k, int part, Ints (&maps)[MAPS]) {
  maps[0] = load_bytes(record + k * WORD_BYTES + 32 * part);
  maps[1] = load_bytes(record + k * WORD_BYTES + 64 + 32 * part);
  if constexpr (MAPS == 3) maps[2] = _mm256_and_si256(maps[0], maps[1]);
}

PALEY_INLINE Ints popcount_bytes(Ints a) {
  const Ints counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                       0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const Ints low = _mm256_set1_epi8(15);
  const Ints lower = _mm256_shuffle_epi8(counts, _mm256_and_si256(a, low));
  return _mm256_add_epi8(lower, _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
}

// Path 1. Counts gather in bytes, at most 8 MAX_WORDS; the zero point is a fifth plane of ones with the factor -zero.
template <int MAPS, int T>
PALEY_INLINE void popcount_sums(const uint8_t* record, int words, const uint8_t* planes, int, const int32_t* zeros,
                                const Work&, Rows (&sums)[T][MAPS]) {
  static_assert(T == 1 && 8 * MAX_WORDS < 256);
  PALEY_UNROLL for (int part = 0; part < 2; ++part) {
    Ints sum[MAPS] = {};
    for (int a = 0; a < 5; ++a) {
      Ints count[MAPS] = {};
      for (int k = 0; k < words; ++k) {
        const Ints plane = a < 4 ? load_four(planes + 4 * (a * words + k)) : all(-1);
        Ints maps[MAPS];
        load_maps(record, k, part, maps);
        PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
          count[m] = _mm256_add_epi8(count[m], popcount_bytes(_mm256_and_si256(plane, maps[m])));
        }
      }
      const Ints factor = _mm256_set1_epi8(static_cast<char>(a < 4 ? 1 << a : -zeros[0]));
      PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
        sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(count[m], factor));
      }
    }
    PALEY_UNROLL for (int m = 0; m < MAPS; ++m) sums[0][m].part[part] = _mm256_madd_epi16(sum[m], _mm256_set1_epi16(1));
  }
}

// Path 2. Products of a word's 32 columns gather in 16 bits: 16 (129 * 15) < 2^15.
template <int MAPS, int T>
PALEY_INLINE void dot_sums(const uint8_t*, int words, const uint8_t* x, int stride, const Work& work,
                           Rows (&sums)[T][MAPS]) {
  const Ints ones = _mm256_set1_epi16(1);
  for (int part = 0; part < 2; ++part) {
    Ints first[T] = {}, second[T] = {};
    for (int k = 0; k < words; ++k) {
      Ints a[T] = {}, b[T] = {};
      PALEY_UNROLL for (int i = 0; i < 8; ++i) {
        const Ints* weights = work.bytes[8 * k + i][part];
        PALEY_UNROLL for (int t = 0; t < T; ++t) {
          const Ints four = load_four(x + t * stride + 32 * k + 4 * i);
          a[t] = _mm256_add_epi16(a[t], _mm256_maddubs_epi16(weights[0], four));
          b[t] = _mm256_add_epi16(b[t], _mm256_maddubs_epi16(weights[1], four));
        }
      }
      PALEY_UNROLL for (int t = 0; t < T; ++t) {
        first[t] = _mm256_add_epi32(first[t], _mm256_madd_epi16(a[t], ones));
        second[t] = _mm256_add_epi32(second[t], _mm256_madd_epi16(b[t], ones));
      }
    }
    PALEY_UNROLL for (int t = 0; t < T; ++t) {
      const Ints mixed = _mm256_sub_epi32(first[t], _mm256_slli_epi32(second[t], 7));
      const Ints S = _mm256_srai_epi32(_mm256_slli_epi32(mixed, 18), 18);
      const Ints Q = _mm256_srai_epi32(_mm256_sub_epi32(first[t], S), 7);
      sums[t][0].part[part] = S;
      sums[t][1].part[part] = Q;
      if constexpr (MAPS == 3) sums[t][2].part[part] = _mm256_srai_epi32(_mm256_sub_epi32(second[t], Q), 7);
    }
  }
}

PALEY_INLINE void dot_weights(const uint8_t* record, int k, Work& work) {
  const Ints one = all(0x01010101), top = all(static_cast<int32_t>(0x80808080));
  for (int part = 0; part < 2; ++part) {
    Ints maps[3];
    load_maps(record, k, part, maps);
    PALEY_UNROLL for (int i = 0; i < 8; ++i) {
      const Ints s = _mm256_and_si256(_mm256_srli_epi32(maps[0], i), one);
      const Ints q = _mm256_and_si256(_mm256_srli_epi32(maps[1], i), one);
      Ints* to = work.bytes[8 * k + i][part];
      to[0] = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(maps[1], 7 - i), top), s);
      to[1] = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(maps[2], 7 - i), top), q);
    }
  }
}

// Path 3. A shuffle has one table of 16 entries for 16 bytes, so those must be the same byte of sixteen rows: a
// register holds byte b of the words of S below that of Q; for S & Q, byte b below byte b + 1.
template <int MAPS>
PALEY_INLINE void table_indices(const uint8_t* record, int k, Work& work) {
  const Ints transpose = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Ints low = _mm256_set1_epi8(15);
  Ints four[4];
  PALEY_UNROLL for (int j = 0; j < 4; ++j) {
    const uint8_t* from = record + k * WORD_BYTES + 16 * j;
    const __m128i s = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 64));
    four[j] = _mm256_shuffle_epi8(_mm256_set_m128i(q, s), transpose);
  }
  const Ints a = _mm256_unpacklo_epi32(four[0], four[1]), b = _mm256_unpackhi_epi32(four[0], four[1]);
  const Ints c = _mm256_unpacklo_epi32(four[2], four[3]), d = _mm256_unpackhi_epi32(four[2], four[3]);
  Ints bytes[6];
  bytes[0] = _mm256_unpacklo_epi64(a, c);
  bytes[1] = _mm256_unpackhi_epi64(a, c);
  bytes[2] = _mm256_unpacklo_epi64(b, d);
  bytes[3] = _mm256_unpackhi_epi64(b, d);
  PALEY_UNROLL for (int j = 0; j < 2; ++j) {
    const Ints s = _mm256_permute2x128_si256(bytes[2 * j], bytes[2 * j + 1], 0x20);
    const Ints q = _mm256_permute2x128_si256(bytes[2 * j], bytes[2 * j + 1], 0x31);
    bytes[4 + j] = _mm256_and_si256(s, q);
  }
  PALEY_UNROLL for (int j = 0; j < 2 * MAPS; ++j) {
    work.indices[k][j][0] = _mm256_and_si256(bytes[j], low);
    work.indices[k][j][1] = _mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), low);
  }
}

// Adds the bytes of a and b, of one row each side by side, to rows 0..7 and 8..15 of each half.
PALEY_INLINE void add_rows(Ints a, Ints b, Ints (&sum)[2]) {
  const Ints ones = _mm256_set1_epi8(1);
  sum[0] = _mm256_add_epi16(sum[0], _mm256_maddubs_epi16(ones, _mm256_unpacklo_epi8(a, b)));
  sum[1] = _mm256_add_epi16(sum[1], _mm256_maddubs_epi16(ones, _mm256_unpackhi_epi8(a, b)));
}

template <int MAPS, int T>
PALEY_INLINE void table_sums(const uint8_t*, int words, const uint8_t* tables, int stride, const Work& work,
                             Rows (&sums)[T][MAPS]) {
  Ints maps[T][2] = {}, both[T][2] = {};
  for (int k = 0; k < words; ++k, tables += 2 * TABLE_BYTES) {
    const auto& indices = work.indices[k];
    PALEY_UNROLL for (int t = 0; t < T; ++t) {
      const uint8_t* lower = tables + t * stride;
      const uint8_t* upper = lower + TABLE_BYTES;
      PALEY_UNROLL for (int j = 0; j < 4; j += 2) {
        Ints eight[2];  // eight columns: at most 120, which a signed byte holds
        PALEY_UNROLL for (int b = 0; b < 2; ++b) {
          const Ints* index = indices[j + b];
          eight[b] = _mm256_add_epi8(_mm256_shuffle_epi8(load_twice(lower + 16 * (j + b)), index[0]),
                                     _mm256_shuffle_epi8(load_twice(upper + 16 * (j + b)), index[1]));
        }
        add_rows(eight[0], eight[1], maps[t]);
      }
      if constexpr (MAPS == 3) {
        Ints eight[2];
        PALEY_UNROLL for (int j = 0; j < 2; ++j) {
          eight[j] = _mm256_add_epi8(_mm256_shuffle_epi8(load_bytes(lower + 32 * j), indices[4 + j][0]),
                                     _mm256_shuffle_epi8(load_bytes(upper + 32 * j), indices[4 + j][1]));
        }
        add_rows(eight[0], eight[1], both[t]);
      }
    }
  }
  PALEY_UNROLL for (int t = 0; t < T; ++t) {
    PALEY_UNROLL for (int part = 0; part < 2; ++part) {
      sums[t][0].part[part] = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(maps[t][part]));
      sums[t][1].part[part] = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(maps[t][part], 1));
      if constexpr (MAPS == 3) {
        const Ints sum = both[t][part];
        sums[t][2].part[part] = _mm256_cvtepi16_epi32(
            _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1)));
      }
    }
  }
}

// x: int8 [16] -> for byte b of a word, entry e: the sum of x[4i + b] over the bits i of e.
PALEY_INLINE void make_tables(const uint8_t* x, uint8_t* tables) {
  const Ints from = load_twice(x), entry = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  //
                                                            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  PALEY_UNROLL for (int b = 0; b < 4; b += 2) {
    const Ints byte = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(b + 1)), _mm_set1_epi8(static_cast<char>(b)));
    Ints sum = _mm256_setzero_si256();
    PALEY_UNROLL for (int i = 0; i < 4; ++i) {
      const Ints bit = _mm256_set1_epi8(static_cast<char>(1 << i));
      const Ints has = _mm256_cmpeq_epi8(_mm256_and_si256(entry, bit), bit);
      const Ints value = _mm256_shuffle_epi8(from, _mm256_add_epi8(byte, _mm256_set1_epi8(static_cast<char>(4 * i))));
      sum = _mm256_add_epi8(sum, _mm256_and_si256(has, value));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 16 * b), sum);
  }
}

// What tiles of tokens share.
template <int PATH, int MAPS>
PALEY_INLINE void prepare_weights(const uint8_t* record, int words, int, Work& work) {
  if constexpr (PATH == PALEY_POPCOUNT) return;
  for (int k = 0; k < words; ++k) {
    if constexpr (PATH == PALEY_DOTS) {
      dot_weights(record, k, work);
    } else {
      table_indices<MAPS>(record, k, work);
    }
  }
}
