// The three ways to S, Q and R, sixteen rows at a time, a row in each 32-bit lane. Included by planes_avx512.cpp.

// Path 1, the binary arithmetic of arXiv:2504.05352: the planes X_a of the inputs, bit a of each code;
// S = sum_a 2^a popcount(X_a & S) - zero popcount(S). VPOPCNTDQ counts 16 words at once. From the highest plane down,
// so that doubling the sum so far is all that the powers of two take.
template <int MAPS, int T>
PALEY_INLINE void popcount_sums(const uint8_t* record, int words, const uint8_t* planes, int stride,
                                const int32_t* zeros, const Work& work, Rows (&sums)[T][MAPS]) {
  Ints sum[T][MAPS] = {};
  if constexpr (T < kept_from(PALEY_POPCOUNT)) {  // one look at each map
    Ints count[5][MAPS] = {};
    for (int k = 0; k < words; ++k) {
      Ints maps[MAPS];
      load_maps(record, k, maps);
      PALEY_UNROLL for (int a = 0; a < 5; ++a) {
        PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
          const Ints some = a < 4 ? _mm512_and_si512(load_four(planes + 4 * (a * words + k)), maps[m]) : maps[m];
          count[a][m] = _mm512_add_epi32(count[a][m], _mm512_popcnt_epi32(some));
        }
      }
    }
    PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
      PALEY_UNROLL for (int a = 3; a >= 0; --a) {
        sum[0][m] = _mm512_add_epi32(_mm512_slli_epi32(sum[0][m], 1), count[a][m]);
      }
      sums[0][m].part[0] = _mm512_sub_epi32(sum[0][m], _mm512_mullo_epi32(count[4][m], all(zeros[0])));
    }
    return;
  }
  for (int a = 3; a >= 0; --a) {
    PALEY_UNROLL for (int t = 0; t < T; ++t) {
      PALEY_UNROLL for (int m = 0; m < MAPS; ++m) sum[t][m] = _mm512_add_epi32(sum[t][m], sum[t][m]);
    }
    for (int k = 0; k < words; ++k) {
      PALEY_UNROLL for (int t = 0; t < T; ++t) {
        const Ints plane = load_four(planes + t * stride + 4 * (a * words + k));
        PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
          const Ints both = _mm512_and_si512(plane, work.maps[k][m]);
          sum[t][m] = _mm512_add_epi32(sum[t][m], _mm512_popcnt_epi32(both));
        }
      }
    }
  }
  PALEY_UNROLL for (int t = 0; t < T; ++t) {
    PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
      sums[t][m].part[0] = _mm512_sub_epi32(sum[t][m], _mm512_mullo_epi32(work.counts[m], all(zeros[t])));
    }
  }
}

// The bytes of four columns, i of the eight in a word.
PALEY_INLINE void dot_weights(const Ints (&maps)[3], int i, Ints& first, Ints& second) {
  const Ints one = all(0x01010101), top = all(static_cast<int32_t>(0x80808080));
  const Ints s = _mm512_and_si512(_mm512_srli_epi32(maps[0], i), one);
  const Ints q = _mm512_and_si512(_mm512_srli_epi32(maps[1], i), one);
  first = _mm512_ternarylogic_epi32(_mm512_slli_epi32(maps[1], 7 - i), top, s, 0xea);  // (Q & top) | s
  second = _mm512_ternarylogic_epi32(_mm512_slli_epi32(maps[2], 7 - i), top, q, 0xea);
}

// Path 2, integer dot products: bytes s + 128 q and q + 128 s q times the signed bytes x - zero, four columns to a
// lane (VNNI). T = S + 128 Q and U = Q + 128 R give T - 128 U = S - 2^14 R, and |S| < 2^13: two products give three
// sums.
template <int MAPS, int T>
PALEY_INLINE void dot_sums(const uint8_t* record, int words, const uint8_t* x, int stride, const Work& work,
                           Rows (&sums)[T][MAPS]) {
  Ints first[T] = {}, second[T] = {};
  for (int k = 0; k < words; ++k, x += 32) {
    Ints maps[3];
    load_maps(record, k, maps);
    PALEY_UNROLL for (int i = 0; i < 8; ++i) {
      Ints a, b;
      if constexpr (T < kept_from(PALEY_DOTS)) {
        dot_weights(maps, i, a, b);
      } else {
        a = work.bytes[8 * k + i][0];
        b = work.bytes[8 * k + i][1];
      }
      PALEY_UNROLL for (int t = 0; t < T; ++t) {
        const Ints four = load_four(x + t * stride + 4 * i);
        first[t] = _mm512_dpbusd_epi32(first[t], a, four);
        second[t] = _mm512_dpbusd_epi32(second[t], b, four);
      }
    }
  }
  PALEY_UNROLL for (int t = 0; t < T; ++t) {
    const Ints mixed = _mm512_sub_epi32(first[t], _mm512_slli_epi32(second[t], 7));
    const Ints S = _mm512_srai_epi32(_mm512_slli_epi32(mixed, 18), 18);
    const Ints Q = _mm512_srai_epi32(_mm512_sub_epi32(first[t], S), 7);
    sums[t][0].part[0] = S;
    sums[t][1].part[0] = Q;
    if constexpr (MAPS == 3) sums[t][2].part[0] = _mm512_srai_epi32(_mm512_sub_epi32(second[t], Q), 7);
  }
}

// Path 3, tables: the 16 sums that four inputs can have, looked up by four bits of a map. A permutation (VBMI) looks up
// 64 times four columns at once; its table is the four tables of the bytes of a word, side by side. Indices are made
// for each tile of tokens again: to keep them was slower by 7%.
template <int MAPS, int T>
PALEY_INLINE void table_sums(const uint8_t* record, int words, const uint8_t* tables, int stride, const Work&,
                             Rows (&sums)[T][MAPS]) {
  const Ints low = all(0x0f0f0f0f), byte = all(0x30201000), ones = all(0x01010101);
  Ints sum[T][MAPS] = {};
  for (int k = 0; k < words; ++k, tables += 2 * TABLE_BYTES) {
    Ints maps[MAPS], lower[MAPS], upper[MAPS];
    load_maps(record, k, maps);
    PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
      lower[m] = _mm512_ternarylogic_epi32(maps[m], low, byte, 0xea);  // (map & low) | byte
      upper[m] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(maps[m], 4), low, byte, 0xea);
    }
    PALEY_UNROLL for (int t = 0; t < T; ++t) {
      const Ints a = load_bytes(tables + t * stride), b = load_bytes(tables + t * stride + TABLE_BYTES);
      PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {  // eight columns: at most 120, which a signed byte holds
        const Ints eight = _mm512_add_epi8(_mm512_permutexvar_epi8(lower[m], a), _mm512_permutexvar_epi8(upper[m], b));
        sum[t][m] = _mm512_dpbusd_epi32(sum[t][m], ones, eight);
      }
    }
  }
  PALEY_UNROLL for (int t = 0; t < T; ++t) {
    PALEY_UNROLL for (int m = 0; m < MAPS; ++m) sums[t][m].part[0] = sum[t][m];
  }
}

// x: int8 [16] -> for byte b of a word, entry e: the sum of x[4i + b] over the bits i of e.
PALEY_INLINE void make_tables(const uint8_t* x, uint8_t* tables) {
  const Ints from = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256i lower = _mm256_set_m128i(_mm_set1_epi8(1), _mm_set1_epi8(0));
  const __m256i upper = _mm256_set_m128i(_mm_set1_epi8(3), _mm_set1_epi8(2));
  const Ints byte = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
  const uint64_t has[4] = {0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc, 0xf0f0f0f0f0f0f0f0, 0xff00ff00ff00ff00};
  Ints sum = _mm512_setzero_si512();
  PALEY_UNROLL for (int i = 0; i < 4; ++i) {
    const Ints at = _mm512_add_epi8(byte, _mm512_set1_epi8(static_cast<char>(4 * i)));
    sum = _mm512_add_epi8(sum, _mm512_maskz_shuffle_epi8(has[i], from, at));
  }
  _mm512_storeu_si512(tables, sum);
}

// What several tiles of tokens would else compute from the same record again.
template <int PATH, int MAPS>
PALEY_INLINE void prepare_weights(const uint8_t* record, int words, int tokens, Work& work) {
  if (PATH == PALEY_TABLES || tokens < kept_from(PATH)) return;
  PALEY_UNROLL for (int m = 0; m < MAPS; ++m) work.counts[m] = _mm512_setzero_si512();
  for (int k = 0; k < words; ++k) {
    if constexpr (PATH == PALEY_POPCOUNT) {
      Ints maps[MAPS];
      load_maps(record, k, maps);
      PALEY_UNROLL for (int m = 0; m < MAPS; ++m) {
        work.maps[k][m] = maps[m];
        work.counts[m] = _mm512_add_epi32(work.counts[m], _mm512_popcnt_epi32(maps[m]));
      }
    } else {
      Ints maps[3];
      load_maps(record, k, maps);
      PALEY_UNROLL for (int i = 0; i < 8; ++i) dot_weights(maps, i, work.bytes[8 * k + i][0], work.bytes[8 * k + i][1]);
    }
  }
}
