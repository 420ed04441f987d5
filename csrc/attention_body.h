// Attention over packed keys and values, once for each instruction set: included inside a namespace after
// steps_body.h. A segment's tokens are scored page by page, then weighed page by page. float16 is read as it is; codes
// are decoded to floats first, unless `Integers` multiplies them themselves.

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

// scores [R, SEGMENT] of L V keys: keys [width, PAGE].
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
    for (int v = 0; v < V; ++v) store(scores + r * SEGMENT + L * v, found[r][v]);
  }
}

template <int R, class T>
PALEY_INLINE void score_rows(const float* q, int64_t stride, const T* keys, int64_t width, int64_t from, int64_t to,
                             float* scores) {
  for (; from + 4 * L <= to; from += 4 * L) score_tile<R, 4>(q, stride, keys + from, width, scores + from);
  for (; from < to; from += L) score_tile<R, 1>(q, stride, keys + from, width, scores + from);
}

// scores [rows, SEGMENT] of the tokens [from, to), multiples of LANES.
template <class T>
void score(const float* q, int32_t rows, int64_t stride, const T* keys, int64_t width, int64_t from, int64_t to,
           float* scores) {
  constexpr int R = L / 4;  // as many as registers hold
  int32_t r = 0;
  for (; r + R <= rows; r += R) score_rows<R>(q + r * stride, stride, keys, width, from, to, scores + r * SEGMENT);
  q += r * stride;
  scores += r * SEGMENT;
  if constexpr (R == 4) {
    if (rows - r == 3) return score_rows<3>(q, stride, keys, width, from, to, scores);
    if (rows - r == 2) return score_rows<2>(q, stride, keys, width, from, to, scores);
  }
  if (r < rows) score_rows<1>(q, stride, keys, width, from, to, scores);
}

// scores [R, SEGMENT] of the tokens [from, to), a multiple of 4 of them, += q [R, stride] table [PAGE, stride]
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
      for (int k = 0; k < 4; ++k) scores[r * SEGMENT + j + k] += more[r][k];
    }
  }
}

inline void add_scores(const float* q, int32_t rows, const float* table, int64_t stride, int64_t from, int64_t to,
                       float* scores) {
  constexpr int R = L / 4;
  int32_t r = 0;
  for (; r + R <= rows; r += R) add_scores_of<R>(q + r * stride, table, stride, from, to, scores + r * SEGMENT);
  for (; r < rows; ++r) add_scores_of<1>(q + r * stride, table, stride, from, to, scores + r * SEGMENT);
}

// sums [R, L V] += weights [R, SEGMENT] values [count, L V]: enough sums at a time that none waits for its last one.
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
      const F weight = all(weights[r * SEGMENT + j]);
      for (int v = 0; v < V; ++v) found[r][v] = fused(weight, value[v], found[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(to + r * stride + L * v, found[r][v]);
  }
}

// sums [R, stride] += weights [R, SEGMENT] values [count, width]; what is behind a row adds to sums that nobody reads.
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
  for (; r + 4 <= rows; r += 4) weigh_rows<4>(weights + r * SEGMENT, values, width, count, to + r * stride, stride);
  weights += r * SEGMENT;
  to += r * stride;
  if (rows - r == 3) return weigh_rows<3>(weights, values, width, count, to, stride);
  if (rows - r == 2) return weigh_rows<2>(weights, values, width, count, to, stride);
  if (rows - r == 1) return weigh_rows<1>(weights, values, width, count, to, stride);
}

// scores [from, to) of one query, multiples of L -> weights exp(score - most) in place, 0 for those beyond [low, high),
// and their sum.
PALEY_INLINE void soften(float* scores, int64_t from, int64_t to, int64_t low, int64_t high, float& most,
                         float& total) {
  most = -INFINITY;
  total = 0.0f;
  if (low >= high) {
    std::fill(scores + from, scores + to, 0.0f);
    return;
  }
  std::fill(scores + from, scores + low, -INFINITY);
  std::fill(scores + high, scores + to, -INFINITY);
  F top = load(scores + from);
  for (int64_t j = from + L; j < to; j += L) top = greatest(top, load(scores + j));
  float lanes[L];
  store(lanes, top);
  for (float lane : lanes) most = lane > most ? lane : most;
  if (most == -INFINITY) most = 0.0f;  // all of them are NaN, and stay it
  F found = all(0.0f);
  for (int64_t j = from; j < to; j += L) {
    const F weight = exponential(load(scores + j) - all(most));
    store(scores + j, weight);
    found += weight;
  }
  total = sum(found);
}

// Asks for the codes of a page before they are needed.
PALEY_INLINE void fetch(const Side& side, uint8_t* half, int32_t head) {
  const uint8_t* codes = side.codes(half, head);
  for (int64_t at = 0; at < PAGE * side.row_bytes; at += 64) __builtin_prefetch(codes + at);
  for (int32_t g = 0; g < side.groups; ++g) {
    for (int64_t at = 0; at < PAGE; at += 32) __builtin_prefetch(side.scales_of(half, head, g) + at);
    if (side.affine) __builtin_prefetch(side.zeros_of(half, head, g));
  }
}

template <class Integers>
void attend_with(const AttendTask& task) {
  const Side &keys = *task.keys, &values = *task.values;
  const int64_t origin = task.begin, page_0 = origin / PAGE;  // places below are counted from there
  int64_t low = task.end, high = origin;                      // what any query sees
  for (int32_t r = 0; r < task.rows; ++r) {
    low = std::min(low, task.window ? std::max(origin, task.at[r] - task.window + 1) : origin);
    high = std::max(high, std::min(task.end, task.at[r] + 1));
  }
  low -= origin;
  high -= origin;
  std::fill_n(task.sums, int64_t{task.rows} * values.padded, 0.0f);
  std::fill_n(task.most, task.rows, -INFINITY);
  std::fill_n(task.total, task.rows, 0.0f);
  if (low >= high) return;
  float *tile = task.scratch, *scores = tile + PAGE * std::max(keys.padded, values.padded);
  Integers integers(task, scores + MAX_ROWS * SEGMENT);
  const int64_t from = low / LANES * LANES, to = (high + LANES - 1) / LANES * LANES;

  for (int64_t block = from / PAGE * PAGE; block < to; block += PAGE) {
    const Page* page = task.pages + page_0 + block / PAGE;
    if (block + PAGE < to) fetch(keys, page[1].keys.get(), task.head);
    if (block < low + PAGE) fetch(values, page[0].values.get(), task.head);
    const int64_t begin = std::max(from - block, int64_t{0}), end = std::min(to - block, PAGE);
    uint8_t* half = page->keys.get();
    float* mine = scores + block;
    if (integers.takes_keys()) {
      integers.score(half, begin, end, mine);
    } else if (keys.bits == 16) {
      const auto* halves = reinterpret_cast<const uint16_t*>(keys.codes(half, task.head));
      score(task.queries, task.rows, keys.padded, halves, keys.width, begin, end, mine);
    } else {
      decode(keys, half, task.head, begin, end, tile);
      score(task.queries, task.rows, keys.padded, tile, keys.width, begin, end, mine);
    }
    if (task.base) {
      const int64_t last = std::min(high - block, PAGE);
      add_scores(task.base, task.rows, task.table + (origin + block) * task.base_width, task.base_width, begin, last,
                 mine);
    }
  }

  for (int32_t r = 0; r < task.rows; ++r) {
    float* mine = scores + r * SEGMENT;
    if (task.base && origin == 0 && low == 0) mine[0] += task.first[r];
    if (task.cap > 0) cap(mine + from, to - from, task.cap);
    const int64_t begin = std::max(low, task.window ? task.at[r] - task.window + 1 - origin : 0);
    soften(mine, from, to, begin, std::min(high, task.at[r] + 1 - origin), task.most[r], task.total[r]);
  }

  if (integers.takes_values()) return integers.weigh(page_0, scores, from, to);
  for (int64_t block = from / PAGE * PAGE; block < high; block += PAGE) {
    const Page* page = task.pages + page_0 + block / PAGE;
    if (block + PAGE < high) fetch(values, page[1].values.get(), task.head);
    const int64_t begin = std::max(low - block, int64_t{0}), count = std::min(high - block, PAGE) - begin;
    const float* weights = scores + block + begin;
    uint8_t* half = page->values.get();
    if (values.bits == 16) {
      const auto* halves = reinterpret_cast<const uint16_t*>(values.codes(half, task.head)) + begin * values.width;
      weigh(weights, task.rows, halves, values.width, count, task.sums, values.padded);
    } else {
      decode(values, half, task.head, begin, begin + count, tile);
      weigh(weights, task.rows, tile + begin * values.padded, values.padded, count, task.sums, values.padded);
    }
  }
}

// For processors that multiply no bytes: every code becomes a float.
struct NoIntegers {
  NoIntegers(const AttendTask&, float*) {}
  static bool takes_keys() { return false; }
  static bool takes_values() { return false; }
  static void score(uint8_t*, int64_t, int64_t, float*) {}
  static void weigh(int64_t, const float*, int64_t, int64_t) {}
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
