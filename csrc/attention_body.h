// Attention over packed keys and values, once for each instruction set: included inside a namespace after
// steps_body.h. The tokens of a page are scored and weighed at a time. float16 is read as it is; codes are decoded to
// floats first, unless `Integers` multiplies them themselves.

constexpr int64_t HALF_MAX = 65504;

void put_half(const float* values, int32_t n, uint16_t* halves) {
  const F most = all(HALF_MAX);
  int32_t i = 0;
  for (; i + L <= n; i += L) {
    F a = load(values + i);
    a = choose(a > most, most, choose(a < -most, -most, a));
    to_half(a, halves + i);
  }
  for (; i < n; ++i) {
    const float a = values[i];
    halves[i] = one_to_half(a > HALF_MAX ? HALF_MAX : a < -HALF_MAX ? -HALF_MAX : a);
  }
}

// --- codes to floats -----------------------------------------------------------------------------------------

// Adds what the plane of P bits holds of N codes of B bits. parts: quads or octs of a row, part: the one asked for;
// byte: which of the dwords that lie side by side; stride: bytes from unit to unit. -> where the next plane begins.
template <int B, int P, int N>
PALEY_INLINE const uint8_t* add_plane(const uint8_t* plane, int64_t parts, int64_t part, int32_t byte, int64_t stride,
                                      uint32_t (&codes)[N]) {
  if constexpr ((B & P) == 0) return plane;
  constexpr int BELOW = B & ~(2 * P - 1);  // bits in the planes before
  const auto shift = static_cast<int32_t>(8 * byte + part * P % 8);
  const uint8_t* from = plane + part * P / 8 * stride;
  for (int i = 0; i < N; ++i) {
    uint32_t word;
    std::memcpy(&word, from + 4 * i, sizeof word);
    codes[i] |= (word >> shift & ((1u << P) - 1)) << BELOW;
  }
  return plane + plane_units(parts, P) * stride;
}

template <int B, int N>
PALEY_INLINE void codes_at(const uint8_t* codes, int64_t parts, int64_t part, int32_t byte, int64_t stride,
                           uint32_t (&found)[N]) {
  for (uint32_t& code : found) code = 0;
  codes = add_plane<B, 8>(codes, parts, part, byte, stride, found);
  codes = add_plane<B, 4>(codes, parts, part, byte, stride, found);
  codes = add_plane<B, 2>(codes, parts, part, byte, stride, found);
  add_plane<B, 1>(codes, parts, part, byte, stride, found);
}

// Slope * code + start on an even grid, (point - zero) * scale on others.
template <int N>
PALEY_INLINE void values_of(const Side& side, const uint32_t (&codes)[N], const float* scale, const float* zero,
                            float* to) {
  if (side.points) {
    for (int i = 0; i < N; ++i) to[i] = (side.points[codes[i]] - zero[i]) * scale[i];
  } else {
    for (int i = 0; i < N; ++i) {
      to[i] = side.step * scale[i] * static_cast<float>(static_cast<int32_t>(codes[i])) +
              (side.first - zero[i]) * scale[i];
    }
  }
}

// The keys [width, PAGE] of the tokens [from, to) of a page, multiples of LANES.
template <int B>
void decode_keys(const Side& side, uint8_t* half, int32_t head, int64_t from, int64_t to, float* tile) {
  const uint8_t* codes = side.codes(half, head);
  const int64_t quads = (side.width + QUAD - 1) / QUAD;
  float scale[PAGE], zero[PAGE] = {};
  for (int32_t i = 0; i < side.width; ++i) {
    if (i % side.group == 0) {
      const uint16_t* scales = side.scales_of(half, head, i / side.group);
      const uint8_t* zeros = side.zeros_of(half, head, i / side.group);
      for (int64_t t = from; t < to; ++t) scale[t] = one_from_half(scales[t]);
      for (int64_t t = from; side.affine && t < to; ++t) zero[t] = zeros[t];
    }
    for (int64_t t = from; t < to; t += LANES) {
      uint32_t found[LANES];
      codes_at<B>(codes + 4 * t, quads, i / QUAD, i % QUAD, 4 * PAGE, found);
      values_of(side, found, scale + t, zero + t, tile + i * PAGE + t);
    }
  }
}

// The values [PAGE, padded] of the tokens [from, to) of a page.
template <int B>
void decode_values(const Side& side, uint8_t* half, int32_t head, int64_t from, int64_t to, float* tile) {
  const int64_t octs = side.padded / OCT;
  for (int64_t t = from; t < to; ++t) {
    const uint8_t* codes = side.codes(half, head) + t / 4 * 4 * side.row_bytes;
    for (int64_t oct = 0; oct < octs; ++oct) {
      uint32_t found[OCT];
      codes_at<B>(codes, octs, oct, static_cast<int32_t>(t % 4), 4 * OCT, found);
      float scale[OCT], zero[OCT] = {};
      for (int64_t i = 0; i < OCT; ++i) {
        const auto g = static_cast<int32_t>(std::min<int64_t>((oct * OCT + i) / side.group, side.groups - 1));
        scale[i] = one_from_half(side.scales_of(half, head, g)[t]);
        if (side.affine) zero[i] = side.zeros_of(half, head, g)[t];
        if (i == 0 && side.group % OCT == 0) {
          for (int64_t k = 1; k < OCT; ++k) scale[k] = scale[0], zero[k] = zero[0];
          break;
        }
      }
      values_of(side, found, scale, zero, tile + t * side.padded + oct * OCT);
    }
  }
}

template <int B>
void decode_as(const Side& side, uint8_t* half, int32_t head, int64_t from, int64_t to, float* tile) {
  if (side.is_keys) return decode_keys<B>(side, half, head, from, to, tile);
  decode_values<B>(side, half, head, from, to, tile);
}

inline void decode(const Side& side, uint8_t* half, int32_t head, int64_t from, int64_t to, float* tile) {
  switch (side.bits) {
    case 2: return decode_as<2>(side, half, head, from, to, tile);
    case 3: return decode_as<3>(side, half, head, from, to, tile);
    case 4: return decode_as<4>(side, half, head, from, to, tile);
    case 5: return decode_as<5>(side, half, head, from, to, tile);
    case 6: return decode_as<6>(side, half, head, from, to, tile);
    case 7: return decode_as<7>(side, half, head, from, to, tile);
    default: return decode_as<8>(side, half, head, from, to, tile);
  }
}

// --- scores and weighted sums of floats ----------------------------------------------------------------------

PALEY_INLINE F value_at(const float* from, int64_t at) { return load(from + at); }
PALEY_INLINE F value_at(const uint16_t* from, int64_t at) { return from_half(from + at); }

// scores [R, PAGE] of L V keys: keys [width, PAGE].
template <int R, int V, class T>
PALEY_INLINE void score_tile(const float* q, int64_t stride, const T* keys, int64_t width, float* scores) {
  F found[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) found[r][v] = all(0.0f);
  }
  for (int64_t i = 0; i < width; ++i) {
    F key[V];
    for (int v = 0; v < V; ++v) key[v] = value_at(keys, i * PAGE + L * v);
    for (int r = 0; r < R; ++r) {
      const F a = all(q[r * stride + i]);
      for (int v = 0; v < V; ++v) found[r][v] = fused(a, key[v], found[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(scores + r * PAGE + L * v, found[r][v]);
  }
}

template <int R, class T>
PALEY_INLINE void score_rows(const float* q, int64_t stride, const T* keys, int64_t width, int64_t from, int64_t to,
                             float* scores) {
  for (; from + 4 * L <= to; from += 4 * L) score_tile<R, 4>(q, stride, keys + from, width, scores + from);
  for (; from < to; from += L) score_tile<R, 1>(q, stride, keys + from, width, scores + from);
}

// scores [rows, PAGE] of the tokens [from, to), multiples of LANES.
template <class T>
void score(const float* q, int32_t rows, int64_t stride, const T* keys, int64_t width, int64_t from, int64_t to,
           float* scores) {
  constexpr int R = L / 4;  // as many as registers hold
  int32_t r = 0;
  for (; r + R <= rows; r += R) score_rows<R>(q + r * stride, stride, keys, width, from, to, scores + r * PAGE);
  q += r * stride;
  scores += r * PAGE;
  if constexpr (R == 4) {
    if (rows - r == 3) return score_rows<3>(q, stride, keys, width, from, to, scores);
    if (rows - r == 2) return score_rows<2>(q, stride, keys, width, from, to, scores);
  }
  if (r < rows) score_rows<1>(q, stride, keys, width, from, to, scores);
}

// scores [R, PAGE] of the tokens [from, to), a multiple of 4 of them, += q [R, stride] table [PAGE, stride]
template <int R>
PALEY_INLINE void add_scores_of(const float* q, const float* table, int64_t stride, int64_t from, int64_t to,
                                float* scores) {
  for (int64_t j = from; j < to; j += 4) {
    F found[R][4];
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < 4; ++k) found[r][k] = all(0.0f);
    }
    for (int64_t i = 0; i < stride; i += L) {
      F key[4];
      for (int k = 0; k < 4; ++k) key[k] = load(table + (j + k) * stride + i);
      for (int r = 0; r < R; ++r) {
        const F a = load(q + r * stride + i);
        for (int k = 0; k < 4; ++k) found[r][k] = fused(a, key[k], found[r][k]);
      }
    }
    float more[R][4];
    sums<R>(found, more[0], 4);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < 4; ++k) scores[r * PAGE + j + k] += more[r][k];
    }
  }
}

inline void add_scores(const float* q, int32_t rows, const float* table, int64_t stride, int64_t from, int64_t to,
                       float* scores) {
  constexpr int R = L / 4;
  int32_t r = 0;
  for (; r + R <= rows; r += R) add_scores_of<R>(q + r * stride, table, stride, from, to, scores + r * PAGE);
  for (; r < rows; ++r) add_scores_of<1>(q + r * stride, table, stride, from, to, scores + r * PAGE);
}

// sums [R, L V] += weights [R, PAGE] values [count, L V]: enough sums at a time that none waits for its last one.
template <int R, int V, class T>
PALEY_INLINE void weigh_columns(const float* weights, const T* values, int64_t width, int64_t count, float* to,
                                int64_t stride) {
  F found[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) found[r][v] = load(to + r * stride + L * v);
  }
  for (int64_t j = 0; j < count; ++j) {
    F value[V];
    for (int v = 0; v < V; ++v) value[v] = value_at(values, j * width + L * v);
    for (int r = 0; r < R; ++r) {
      const F weight = all(weights[r * PAGE + j]);
      for (int v = 0; v < V; ++v) found[r][v] = fused(weight, value[v], found[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(to + r * stride + L * v, found[r][v]);
  }
}

// sums [R, stride] += weights [R, PAGE] values [count, width]; what is behind a row adds to sums that nobody reads.
template <int R, class T>
PALEY_INLINE void weigh_rows(const float* weights, const T* values, int64_t width, int64_t count, float* to,
                             int64_t stride) {
  constexpr int V = R == 1 ? 8 : R <= 3 || L == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + L * V <= stride; i += L * V) weigh_columns<R, V>(weights, values + i, width, count, to + i, stride);
  for (; i < stride; i += L) weigh_columns<R, 1>(weights, values + i, width, count, to + i, stride);
}

template <class T>
void weigh(const float* weights, int32_t rows, const T* values, int64_t width, int64_t count, float* to,
           int64_t stride) {
  int32_t r = 0;
  for (; r + 4 <= rows; r += 4) weigh_rows<4>(weights + r * PAGE, values, width, count, to + r * stride, stride);
  weights += r * PAGE;
  to += r * stride;
  if (rows - r == 3) return weigh_rows<3>(weights, values, width, count, to, stride);
  if (rows - r == 2) return weigh_rows<2>(weights, values, width, count, to, stride);
  if (rows - r == 1) return weigh_rows<1>(weights, values, width, count, to, stride);
}

// scores [to] of one query, to a multiple of L -> weights exp(score - most) in place, 0 for those beyond [low, high);
// most, total and sums follow a greatest score that grows.
PALEY_INLINE void soften(float* scores, int64_t low, int64_t high, int64_t to, float& most, float& total, float* sums,
                         int64_t width) {
  if (low >= high) {
    std::fill_n(scores, to, 0.0f);
    return;
  }
  for (int64_t j = 0; j < low; ++j) scores[j] = -INFINITY;
  for (int64_t j = high; j < to; ++j) scores[j] = -INFINITY;
  F top = load(scores);
  for (int64_t j = L; j < to; j += L) top = greatest(top, load(scores + j));
  float lanes[L], now = most;
  store(lanes, top);
  for (float lane : lanes) now = lane > now ? lane : now;
  if (now == -INFINITY) now = 0.0f;  // all of them are NaN, and stay it
  if (now > most) {
    float factor[L];
    store(factor, exponential(all(most - now)));
    total *= factor[0];
    for (int64_t i = 0; i < width; i += L) store(sums + i, load(sums + i) * all(factor[0]));
    most = now;
  }
  F found = all(0.0f);
  for (int64_t j = 0; j < to; j += L) {
    const F weight = exponential(load(scores + j) - all(most));
    store(scores + j, weight);
    found += weight;
  }
  total += sum(found);
}

template <class Integers>
void attend_with(const AttendTask& task) {
  const Side &keys = *task.keys, &values = *task.values;
  const int64_t wide = std::max(keys.padded, values.padded);
  float *tile = task.scratch, *scores = tile + PAGE * wide;
  Integers integers(task, scores + MAX_ROWS * PAGE);
  for (int32_t r = 0; r < task.rows; ++r) task.most[r] = -INFINITY, task.total[r] = 0.0f;
  std::fill_n(task.sums, int64_t{task.rows} * values.padded, 0.0f);
  int64_t seen_low = task.end, seen_high = task.begin;  // what any query sees
  for (int32_t r = 0; r < task.rows; ++r) {
    const int64_t low = task.window ? task.at[r] - task.window + 1 : 0;
    seen_low = std::min(seen_low, low);
    seen_high = std::max(seen_high, task.at[r] + 1);
  }
  for (int64_t block = task.begin / PAGE * PAGE; block < task.end; block += PAGE) {
    const int64_t low = std::max({block, task.begin, seen_low}) - block;
    const int64_t high = std::min({block + PAGE, task.end, seen_high}) - block;
    if (low >= high) continue;
    const int64_t from = low / LANES * LANES, to = (high + LANES - 1) / LANES * LANES;
    const Page& page = task.pages[block / PAGE];
    uint8_t *key_half = page.keys.get(), *value_half = page.values.get();
    if (integers.scores(key_half, from, to, scores)) {
    } else if (keys.bits == 16) {
      const auto* halves = reinterpret_cast<const uint16_t*>(keys.codes(key_half, task.head));
      score(task.queries, task.rows, keys.padded, halves, keys.width, from, to, scores);
    } else {
      decode(keys, key_half, task.head, from, to, tile);
      score(task.queries, task.rows, keys.padded, tile, keys.width, from, to, scores);
    }
    if (task.base) {
      add_scores(task.base, task.rows, task.table + block * task.base_width, task.base_width, low / 4 * 4, high,
                 scores);
    }
    for (int32_t r = 0; r < task.rows; ++r) {
      float* mine = scores + r * PAGE;
      if (task.base && block == 0 && low == 0) mine[0] += task.first[r];
      if (task.cap > 0) cap(mine + from, to - from, task.cap);
      const int64_t begin = std::max(low, task.window ? task.at[r] - task.window + 1 - block : 0);
      const int64_t end = std::min(high, task.at[r] + 1 - block);
      soften(mine, begin, end, to, task.most[r], task.total[r], task.sums + int64_t{r} * values.padded, values.padded);
    }
    if (integers.weigh(value_half, scores, from, to)) {
    } else if (values.bits == 16) {
      const auto* halves = reinterpret_cast<const uint16_t*>(values.codes(value_half, task.head));
      weigh(scores + low, task.rows, halves + low * values.width, values.width, high - low, task.sums, values.padded);
    } else {
      decode(values, value_half, task.head, low, high, tile);
      weigh(scores + low, task.rows, tile + low * values.padded, values.padded, high - low, task.sums, values.padded);
    }
  }
}

// For processors that multiply no bytes: every code becomes a float.
struct NoIntegers {
  NoIntegers(const AttendTask&, float*) {}
  static bool scores(uint8_t*, int64_t, int64_t, float*) { return false; }
  static bool weigh(uint8_t*, const float*, int64_t, int64_t) { return false; }
};

void join(float* most, float* total, float* to, float more_most, float more_total, const float* more, int32_t width) {
  if (more_total == 0.0f && more_most == -INFINITY) return;
  const float now = *most > more_most ? *most : more_most;
  float a[L], b[L];
  store(a, exponential(all(*most - now)));
  store(b, exponential(all(more_most - now)));
  *total = *total * a[0] + more_total * b[0];
  for (int32_t i = 0; i < width; i += L) store(to + i, load(to + i) * all(a[0]) + load(more + i) * all(b[0]));
  *most = now;
}
