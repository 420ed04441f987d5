// Scores and weighted sums of codes as they are, by VNNI: included inside a namespace after steps_body.h.
//
// Queries become integers with a scale for each row; weights times the scales of values, with one for each row, group
// and SEGMENT of tokens. They have 16 bits, or 24 if codes have more than 4 bits, whose own rounding is finer. Their
// bytes are multiplied apart. Sums are exact, so that all this rounds far less than codes do.

constexpr int MOST_BYTES = 3;
constexpr int bytes_of(int bits) { return bits <= 4 ? 2 : 3; }
constexpr float finest(int bits) { return 127.0f * (bits <= 4 ? 256 : 65536); }

// x = the sum of 256^(bytes - 1 - k) times byte k, which is put to + k * stride.
PALEY_INLINE void put_bytes(__m512i x, int bytes, int8_t* to, int64_t stride) {
  for (int k = bytes - 1; k >= 0; --k) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k * stride), _mm512_cvtepi32_epi8(x));
    x = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  }
}

PALEY_INLINE __m512i four_bytes(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

// Sums of products with bytes, of R rows and N vectors.
template <int BYTES, int R, int N>
struct Sums {
  __m512i of[BYTES][R][N];

  PALEY_INLINE Sums() {
    PALEY_UNROLL for (int k = 0; k < BYTES; ++k) {
      PALEY_UNROLL for (int r = 0; r < R; ++r) {
        PALEY_UNROLL for (int n = 0; n < N; ++n) of[k][r][n] = _mm512_setzero_si512();
      }
    }
  }
  // bytes: those of the first row; a row and a byte further.
  PALEY_INLINE void add(const __m512i (&codes)[N], const int8_t* bytes, int64_t row, int64_t byte) {
    PALEY_UNROLL for (int r = 0; r < R; ++r) {
      PALEY_UNROLL for (int k = 0; k < BYTES; ++k) {
        const __m512i four = four_bytes(bytes + r * row + k * byte);
        PALEY_UNROLL for (int n = 0; n < N; ++n) of[k][r][n] = _mm512_dpbusd_epi32(of[k][r][n], codes[n], four);
      }
    }
  }
  PALEY_INLINE __m512 total(int r, int n) const {
    if constexpr (BYTES == 2) {
      return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(of[0][r][n], 8), of[1][r][n]));
    }
    __m512 found = _mm512_cvtepi32_ps(of[0][r][n]);
    for (int k = 1; k < BYTES; ++k) {
      found = _mm512_fmadd_ps(found, _mm512_set1_ps(256), _mm512_cvtepi32_ps(of[k][r][n]));
    }
    return found;
  }
};

// Quads or octs that share memory in some plane of codes of B bits.
constexpr int parts_together(int bits) { return bits & 1 ? 8 : bits & 2 ? 4 : bits & 4 ? 2 : 1; }

// Where the planes of B bits begin.
template <int B>
struct Planes {
  const uint8_t* of[9];  // by their bits

  Planes(const uint8_t* codes, int64_t parts, int64_t stride) {
    for (const int p : {8, 4, 2, 1}) {
      of[p] = codes;
      if (B & p) codes += plane_units(parts, p) * stride;
    }
  }

  // The codes of a quad of 16 tokens; first: a multiple of parts_together, quad: a constant below it.
  PALEY_INLINE __m512i keys(int64_t first, int quad, int64_t token) const {
    __m512i found = _mm512_setzero_si512();
    add_keys<8>(first, quad, token, found);
    add_keys<4>(first, quad, token, found);
    add_keys<2>(first, quad, token, found);
    add_keys<1>(first, quad, token, found);
    return found;
  }

  // The codes of 16 columns, the octs 2 z and 2 z + 1, of four tokens.
  PALEY_INLINE __m512i values(int64_t z, int64_t offset) const {
    if constexpr (B == 8) return _mm512_loadu_si512(of[8] + offset + 64 * z);
    __m512i found = _mm512_setzero_si512();
    add_values<4>(z, offset, found);
    add_values<2>(z, offset, found);
    add_values<1>(z, offset, found);
    return found;
  }

 private:
  template <int P>
  static PALEY_INLINE void add(__m512i shifted, __m512i& found) {
    constexpr int BELOW = B & ~(2 * P - 1);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << P) - 1));
    found = BELOW ? _mm512_or_si512(found, _mm512_slli_epi32(_mm512_and_si512(shifted, mask), BELOW))
                  : _mm512_and_si512(shifted, mask);
  }
  template <int P>
  PALEY_INLINE void add_keys(int64_t first, int quad, int64_t token, __m512i& found) const {
    if constexpr ((B & P) != 0) {
      const uint8_t* at = of[P] + (first * P / 8 + quad * P / 8) * 4 * PAGE + 4 * token;
      const auto word = (U)_mm512_loadu_si512(at);
      if constexpr (P == 8) {
        found = (__m512i)word;
      } else {
        add<P>((__m512i)(word >> (quad * P % 8)), found);
      }
    }
  }
  template <int P>
  PALEY_INLINE void add_values(int64_t z, int64_t offset, __m512i& found) const {
    if constexpr ((B & P) != 0) {
      const int32_t shift = static_cast<int32_t>(2 * z * P % 8);
      const __m256i octs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of[P] + offset + 2 * z * P / 8 * 32));
      const __m512i shifts = _mm512_mask_set1_epi32(_mm512_set1_epi32(shift), 0xff00, shift + P);
      add<P>(_mm512_srlv_epi32(_mm512_broadcast_i64x4(octs), shifts), found);
    }
  }
};

// float16 scales and what is added to codes, (first - zero), of 16 tokens.
PALEY_INLINE void parameters(const Side& side, uint8_t* half, int32_t head, int32_t g, int64_t token, __m512& scale,
                             __m512& start) {
  scale = (__m512)from_half(side.scales_of(half, head, g) + token);
  start = _mm512_set1_ps(side.first);
  if (side.affine) {
    const auto* zeros = reinterpret_cast<const __m128i*>(side.zeros_of(half, head, g) + token);
    start = _mm512_sub_ps(start, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros))));
  }
}

// Integers of R rows: bytes of the first row, a row and a byte further; a scale of each row, and what is added: to
// scores for each start (a group after the other), or to weighted sums.
struct Rows {
  const int8_t* bytes;
  int64_t row, byte;
  const float *step, *beside;
};

// scores [R, SEGMENT] of 16 T tokens
template <int B, int R, int T>
PALEY_INLINE void score_codes(const Side& side, uint8_t* half, int32_t head, const Rows& q, int64_t token,
                              float* scores) {
  constexpr int TOGETHER = parts_together(B);
  const Planes<B> planes(side.codes(half, head), side.width / QUAD, 4 * PAGE);
  __m512 total[R][T];
  for (int32_t g = 0; g < side.groups; ++g) {
    Sums<bytes_of(B), R, T> sums;
    const int64_t quads = side.group / QUAD, begin = g * quads;
    for (int64_t quad = begin; quad < begin + quads; quad += TOGETHER) {
      PALEY_UNROLL for (int i = 0; i < TOGETHER; ++i) {
        __m512i codes[T];
        PALEY_UNROLL for (int t = 0; t < T; ++t) codes[t] = planes.keys(quad, i, token + LANES * t);
        sums.add(codes, q.bytes + QUAD * (quad + i), q.row, q.byte);
      }
    }
    PALEY_UNROLL for (int t = 0; t < T; ++t) {
      __m512 scale, start;
      parameters(side, half, head, g, token + LANES * t, scale, start);
      PALEY_UNROLL for (int r = 0; r < R; ++r) {
        const __m512 beside = _mm512_mul_ps(start, _mm512_set1_ps(q.beside[r * side.groups + g]));
        const __m512 sum = _mm512_fmadd_ps(sums.total(r, t), _mm512_set1_ps(side.step), beside);
        total[r][t] = g ? _mm512_fmadd_ps(scale, sum, total[r][t]) : _mm512_mul_ps(scale, sum);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      store(scores + r * SEGMENT + token + LANES * t, (F)_mm512_mul_ps(total[r][t], _mm512_set1_ps(q.step[r])));
    }
  }
}

// sums [R, padded] = weights times values, of the columns 16 z .. 16 (z + Z). pages: the first one of the segment.
template <int B, int R, int Z>
PALEY_INLINE void weigh_codes(const Side& side, const Page* pages, int32_t head, const Rows& weights, int64_t z,
                              int64_t from, int64_t to, float* sums) {
  Sums<bytes_of(B), R, Z> found;
  for (int64_t block = from / PAGE * PAGE; block < to; block += PAGE) {
    const Page* page = pages + block / PAGE;
    if (z == 0 && block + PAGE < to) fetch(side, page[1].values.get(), head);
    const Planes<B> planes(side.codes(page->values.get(), head), side.padded / OCT, 4 * OCT);
    const int64_t end = std::min(to - block, PAGE);
    for (int64_t token = std::max(from - block, int64_t{0}); token < end; token += 4) {
      __m512i values[Z];
      PALEY_UNROLL for (int k = 0; k < Z; ++k) values[k] = planes.values(z + k, token * side.row_bytes);
      found.add(values, weights.bytes + block + token, weights.row, weights.byte);
    }
  }
  PALEY_UNROLL for (int r = 0; r < R; ++r) {
    PALEY_UNROLL for (int k = 0; k < Z; ++k) {
      store(sums + int64_t{r} * side.padded + LANES * (z + k),
            fused((F)found.total(r, k), all(weights.step[r]), all(weights.beside[r])));
    }
  }
}

struct Integers {
  Integers(const AttendTask& of, float* scratch)
      : task(of),
        q_step(scratch),
        q_sums(q_step + MAX_ROWS),
        w_step(q_sums + MAX_ROWS * of.keys->groups),
        w_beside(w_step + MAX_ROWS),
        q_bytes(reinterpret_cast<int8_t*>(w_beside + MAX_ROWS)),
        w_bytes(q_bytes + MOST_BYTES * MAX_ROWS * of.keys->padded) {
    if (takes_keys()) round_queries();
  }

  bool takes_keys() const { return takes(*task.keys, QUAD * parts_together(task.keys->bits)); }
  bool takes_values() const { return takes(*task.values, LANES); }

  // scores [rows, SEGMENT] of the tokens [from, to) of a page, multiples of 16.
  void score(uint8_t* half, int64_t from, int64_t to, float* scores) const {
    switch (task.keys->bits) {
      case 2: return score_all<2>(half, from, to, scores);
      case 3: return score_all<3>(half, from, to, scores);
      case 4: return score_all<4>(half, from, to, scores);
      case 5: return score_all<5>(half, from, to, scores);
      case 6: return score_all<6>(half, from, to, scores);
      case 7: return score_all<7>(half, from, to, scores);
      default: return score_all<8>(half, from, to, scores);
    }
  }

  // task.sums by the weights [rows, SEGMENT] of the places [from, to) of the segment that begins at a page.
  void weigh(int64_t page, const float* weights, int64_t from, int64_t to) {
    const Side& side = *task.values;
    const Page* pages = task.pages + page;
    for (int32_t g = 0; g < side.groups; ++g) {
      round_weights(pages, g, weights, from, to);
      switch (side.bits) {
        case 2: weigh_all<2>(pages, g, from, to); break;
        case 3: weigh_all<3>(pages, g, from, to); break;
        case 4: weigh_all<4>(pages, g, from, to); break;
        case 5: weigh_all<5>(pages, g, from, to); break;
        case 6: weigh_all<6>(pages, g, from, to); break;
        case 7: weigh_all<7>(pages, g, from, to); break;
        default: weigh_all<8>(pages, g, from, to); break;
      }
    }
  }

 private:
  static bool takes(const Side& side, int64_t together) {
    return side.bits != 16 && !side.points && side.group % LANES == 0 && side.group % together == 0;
  }

  void round_queries() {
    const Side& side = *task.keys;
    for (int64_t r = 0; r < task.rows; ++r) {
      const float* q = task.queries + r * side.padded;
      F top = all(0.0f), poison = all(0.0f);
      for (int32_t i = 0; i < side.padded; i += L) {
        top = greatest(top, (F)_mm512_abs_ps((__m512)load(q + i)));
        poison += load(q + i) * all(0.0f);  // NaN and infinities stay what they are
      }
      const float most = _mm512_reduce_max_ps((__m512)top), factor = most > 0 ? finest(side.bits) / most : 0.0f;
      q_step[r] = most / finest(side.bits) + sum(poison);
      for (int32_t g = 0, i = 0; g < side.groups; ++g) {
        __m512i total = _mm512_setzero_si512();
        for (; i < (g + 1) * side.group; i += L) {
          const __m512i whole = _mm512_cvtps_epi32((__m512)(load(q + i) * all(factor)));
          total = _mm512_add_epi32(total, whole);
          put_bytes(whole, bytes_of(side.bits), q_bytes + r * side.padded + i, MAX_ROWS * side.padded);
        }
        q_sums[r * side.groups + g] = sum((F)_mm512_cvtepi32_ps(total));
      }
    }
  }

  void round_weights(const Page* pages, int32_t g, const float* weights, int64_t from, int64_t to) {
    const Side& side = *task.values;
    for (int64_t r = 0; r < task.rows; ++r) {
      float product[SEGMENT];
      __m512 most = _mm512_setzero_ps(), beside = _mm512_setzero_ps();
      for (int64_t t = from; t < to; t += LANES) {
        const __m512 weight = (__m512)load(weights + r * SEGMENT + t);
        __m512 scale, start;  // where nothing is seen they may be anything
        parameters(side, pages[t / PAGE].values.get(), task.head, g, t % PAGE, scale, start);
        const __mmask16 some = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 mine = _mm512_maskz_mul_ps(some, weight, scale);
        beside = _mm512_fmadd_ps(mine, start, beside);
        most = _mm512_max_ps(most, _mm512_abs_ps(mine));
        store(product + t, (F)mine);
      }
      const float top = _mm512_reduce_max_ps(most), factor = top > 0 ? finest(side.bits) / top : 0.0f;
      w_step[r] = top / finest(side.bits) * side.step;
      w_beside[r] = sum((F)beside);
      for (int64_t t = from; t < to; t += LANES) {
        const __m512i whole = _mm512_cvtps_epi32((__m512)(load(product + t) * all(factor)));
        put_bytes(whole, bytes_of(side.bits), w_bytes + r * SEGMENT + t, MAX_ROWS * SEGMENT);
      }
    }
  }

  // f(rows, number) of the rows, a few at a time.
  template <class F1>
  PALEY_INLINE void each_rows(const F1& f) const {
    int32_t r = 0;
    for (; r + 4 <= task.rows; r += 4) f(std::integral_constant<int, 4>(), r);
    if (task.rows - r == 3) f(std::integral_constant<int, 3>(), r);
    if (task.rows - r == 2) f(std::integral_constant<int, 2>(), r);
    if (task.rows - r == 1) f(std::integral_constant<int, 1>(), r);
  }

  template <int B>
  void score_all(uint8_t* half, int64_t from, int64_t to, float* scores) const {
    const Side& side = *task.keys;
    each_rows([&](auto rows, int32_t r) {
      const Rows q{q_bytes + int64_t{r} * side.padded, side.padded, MAX_ROWS * side.padded, q_step + r,
                   q_sums + r * side.groups};
      int64_t t = from;
      for (; t + 2 * LANES <= to; t += 2 * LANES) {
        score_codes<B, rows, 2>(side, half, task.head, q, t, scores + r * SEGMENT);
      }
      if (t < to) score_codes<B, rows, 1>(side, half, task.head, q, t, scores + r * SEGMENT);
    });
  }

  template <int B>
  void weigh_all(const Page* pages, int32_t g, int64_t from, int64_t to) const {
    const Side& side = *task.values;
    each_rows([&](auto rows, int32_t r) {
      const Rows weights{w_bytes + r * SEGMENT, SEGMENT, MAX_ROWS * SEGMENT, w_step + r, w_beside + r};
      float* sums = task.sums + int64_t{r} * side.padded;
      int64_t z = g * (side.group / LANES);
      const int64_t end = z + side.group / LANES;
      for (; z + 2 <= end; z += 2) weigh_codes<B, rows, 2>(side, pages, task.head, weights, z, from, to, sums);
      if (z < end) weigh_codes<B, rows, 1>(side, pages, task.head, weights, z, from, to, sums);
    });
  }

  const AttendTask& task;
  // Of queries and of weights: scales [rows], sums of integers [rows, groups], what is added [rows]; bytes.
  float *q_step, *q_sums, *w_step, *w_beside;
  int8_t *q_bytes;  // [byte, row, padded]
  int8_t *w_bytes;  // [byte, row, SEGMENT]
};
