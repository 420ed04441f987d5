// Attention over packed keys and values, once for each instruction set: included inside a namespace after
// steps_body.h. A block of BLOCK_ROWS tokens of a head is decoded to floats in the first cache, scored, and weighed.

constexpr int64_t HALF_MAX = 65504;

void put_half(const float* values, int32_t width, uint8_t* to) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  const F most = all(HALF_MAX);
  int32_t i = 0;
  for (; i + L <= width; i += L) {
    F a = load(values + i);
    a = choose(a > most, most, choose(a < -most, -most, a));
    to_half(a, halves + i);
  }
  for (; i < width; ++i) {
    const float a = values[i];
    halves[i] = one_to_half(a > HALF_MAX ? HALF_MAX : a < -HALF_MAX ? -HALF_MAX : a);
  }
}

PALEY_INLINE int32_t one_code(const uint8_t* row, int32_t index, int32_t bits) {
  const int32_t at = index * bits, low = row[at / 8] >> (at % 8);
  const int32_t high = at % 8 + bits > 8 ? row[at / 8 + 1] << (8 - at % 8) : 0;
  return (low | high) & ((1 << bits) - 1);
}

// Values of a row of codes [width]: slope * code + start on an even grid, (point - zero) * scale on others.
template <int B>
PALEY_INLINE void decode_row(const Side& side, const uint8_t* row, const uint16_t* scales, const uint8_t* zeros,
                             float* to) {
  for (int32_t g = 0; g < side.groups; ++g, to += side.group) {
    const float scale = one_from_half(scales[g]), zero = side.affine ? zeros[g] : 0.0f;
    const float slope = side.step * scale, start = (side.first - zero) * scale;
    const uint8_t* codes = row + static_cast<int64_t>(g) * side.group * B / 8;
    if (side.group % L) {
      for (int32_t i = 0; i < side.group; ++i) {
        const int32_t code = one_code(row, g * side.group + i, B);
        to[i] = side.points ? (side.points[code] - zero) * scale : slope * static_cast<float>(code) + start;
      }
    } else if constexpr (B <= 4 && L == 16) {  // a look into 16 values, which repeat if there are fewer
      F values;  // the same for each code as below
      if (side.points) {
        float points[L];
        for (int i = 0; i < L; ++i) points[i] = side.points[i % (1 << B)];
        values = (load(points) - all(zero)) * all(scale);
      } else {
        float codes_of[L];
        for (int i = 0; i < L; ++i) codes_of[i] = static_cast<float>(i % (1 << B));
        values = fused(load(codes_of), all(slope), all(start));
      }
      for (int32_t i = 0; i < side.group; i += L, codes += L * B / 8) {
        store(to + i, pick_of_16(values, next_codes<B>(codes)));
      }
    } else {
      const F a = all(slope), b = all(start), c = all(scale), d = all(zero);
      for (int32_t i = 0; i < side.group; i += L, codes += L * B / 8) {
        const I at = B <= 4 ? next_codes<B>(codes) & ((1 << B) - 1) : next_codes<B>(codes);
        if (!side.points) {
          store(to + i, fused(to_float(at), a, b));
        } else if constexpr (B <= 4 && L == 8) {
          store(to + i, (pick_of_16(side.points, at) - d) * c);
        } else {
          store(to + i, (pick(side.points, at) - d) * c);
        }
      }
    }
  }
}

template <int B>
void decode_rows(const Side& side, uint8_t* half, int32_t head, int64_t first, int64_t count, float* to) {
  for (int64_t t = first; t < first + count; ++t, to += side.padded) {
    decode_row<B>(side, side.row(half, head, t), side.scale(half, head, t), side.zero(half, head, t), to);
  }
}

// The values [count, padded] of tokens of a page.
inline void decode(const Side& side, uint8_t* half, int32_t head, int64_t first, int64_t count, float* to) {
  switch (side.bits) {
    case 2: return decode_rows<2>(side, half, head, first, count, to);
    case 3: return decode_rows<3>(side, half, head, first, count, to);
    case 4: return decode_rows<4>(side, half, head, first, count, to);
    case 5: return decode_rows<5>(side, half, head, first, count, to);
    case 6: return decode_rows<6>(side, half, head, first, count, to);
    case 7: return decode_rows<7>(side, half, head, first, count, to);
    case 8: return decode_rows<8>(side, half, head, first, count, to);
  }
  for (int64_t t = first; t < first + count; ++t, to += side.padded) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(side.row(half, head, t));
    int32_t i = 0;
    for (; i + L <= side.width; i += L) store(to + i, from_half(row + i));
    for (; i < side.width; ++i) to[i] = one_from_half(row[i]);
  }
}

// scores [R, BLOCK_ROWS] of `count` keys, up to the next multiple of 4: += or = q k.
template <int R>
PALEY_INLINE void score_rows(const float* q, const float* keys, int64_t stride, int64_t count, bool adds,
                             float* scores) {
  for (int64_t j = 0; j < count; j += 4) {
    F found[R][4];
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < 4; ++k) found[r][k] = all(0.0f);
    }
    for (int64_t i = 0; i < stride; i += L) {
      F key[4];
      for (int k = 0; k < 4; ++k) key[k] = load(keys + (j + k) * stride + i);
      for (int r = 0; r < R; ++r) {
        const F a = load(q + r * stride + i);
        for (int k = 0; k < 4; ++k) found[r][k] = fused(a, key[k], found[r][k]);
      }
    }
    if (!adds) {
      sums<R>(found, scores + j, BLOCK_ROWS);
      continue;
    }
    float more[R][4];
    sums<R>(found, more[0], 4);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < 4; ++k) scores[r * BLOCK_ROWS + j + k] += more[r][k];
    }
  }
}

inline void score(const float* q, int32_t rows, const float* keys, int64_t stride, int64_t count, bool adds,
                  float* scores) {
  constexpr int R = L / 4;  // as many as registers hold
  int32_t r = 0;
  for (; r + R <= rows; r += R) score_rows<R>(q + r * stride, keys, stride, count, adds, scores + r * BLOCK_ROWS);
  if constexpr (R == 4) {
    if (rows - r == 3) return score_rows<3>(q + r * stride, keys, stride, count, adds, scores + r * BLOCK_ROWS);
    if (rows - r == 2) return score_rows<2>(q + r * stride, keys, stride, count, adds, scores + r * BLOCK_ROWS);
  }
  if (r < rows) score_rows<1>(q + r * stride, keys, stride, count, adds, scores + r * BLOCK_ROWS);
}

// sums [R, L V] += weights [R, BLOCK_ROWS] values [count, L V]: enough sums at a time that none waits for its last one.
template <int R, int V>
PALEY_INLINE void weigh_columns(const float* weights, const float* values, int64_t stride, int64_t count, float* to) {
  F found[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) found[r][v] = load(to + r * stride + L * v);
  }
  for (int64_t j = 0; j < count; ++j) {
    F value[V];
    for (int v = 0; v < V; ++v) value[v] = load(values + j * stride + L * v);
    for (int r = 0; r < R; ++r) {
      const F weight = all(weights[r * BLOCK_ROWS + j]);
      for (int v = 0; v < V; ++v) found[r][v] = fused(weight, value[v], found[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(to + r * stride + L * v, found[r][v]);
  }
}

// sums [R, stride] += weights [R, BLOCK_ROWS] values [count, stride]
template <int R>
PALEY_INLINE void weigh_rows(const float* weights, const float* values, int64_t stride, int64_t count, float* to) {
  constexpr int V = R == 1 ? 8 : R <= 3 || L == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + L * V <= stride; i += L * V) weigh_columns<R, V>(weights, values + i, stride, count, to + i);
  for (; i < stride; i += L) weigh_columns<R, 1>(weights, values + i, stride, count, to + i);
}

inline void weigh(const float* weights, int32_t rows, const float* values, int64_t stride, int64_t count, float* to) {
  int32_t r = 0;
  for (; r + 4 <= rows; r += 4) weigh_rows<4>(weights + r * BLOCK_ROWS, values, stride, count, to + r * stride);
  weights += r * BLOCK_ROWS;
  to += r * stride;
  if (rows - r == 3) return weigh_rows<3>(weights, values, stride, count, to);
  if (rows - r == 2) return weigh_rows<2>(weights, values, stride, count, to);
  if (rows - r == 1) return weigh_rows<1>(weights, values, stride, count, to);
}

// scores [BLOCK_ROWS] of one query -> weights exp(score - most) in place, 0 for those beyond [low, high); most, total
// and sums follow a greatest score that grows.
PALEY_INLINE void soften(float* scores, int64_t low, int64_t high, float& most, float& total, float* to,
                         int64_t width) {
  if (low >= high) {
    std::fill_n(scores, BLOCK_ROWS, 0.0f);
    return;
  }
  for (int64_t j = 0; (low > 0 || high < BLOCK_ROWS) && j < BLOCK_ROWS; ++j) {
    if (j < low || j >= high) scores[j] = -INFINITY;
  }
  F top = load(scores);
  for (int64_t j = L; j < BLOCK_ROWS; j += L) top = greatest(top, load(scores + j));
  float lanes[L], now = most;
  store(lanes, top);
  for (float lane : lanes) now = lane > now ? lane : now;
  if (now == -INFINITY) now = 0.0f;  // all of them are NaN, and stay it
  if (now > most) {
    float factor[L];
    store(factor, exponential(all(most - now)));
    total *= factor[0];
    for (int64_t i = 0; i < width; i += L) store(to + i, load(to + i) * all(factor[0]));
    most = now;
  }
  F found = all(0.0f);
  for (int64_t j = 0; j < BLOCK_ROWS; j += L) {
    const F weight = exponential(load(scores + j) - all(most));
    store(scores + j, weight);
    found += weight;
  }
  total += sum(found);
}

void attend(const AttendTask& task) {
  const Side &keys = *task.keys, &values = *task.values;
  const int64_t wide = std::max(keys.padded, values.padded);
  float *tile = task.scratch, *scores = tile + BLOCK_ROWS * wide;
  for (int32_t r = 0; r < task.rows; ++r) task.most[r] = -INFINITY, task.total[r] = 0.0f;
  std::fill_n(task.sums, int64_t{task.rows} * values.padded, 0.0f);
  int64_t seen_low = task.end, seen_high = task.begin;  // what any query sees
  for (int32_t r = 0; r < task.rows; ++r) {
    const int64_t low = task.window ? task.at[r] - task.window + 1 : 0;
    seen_low = std::min(seen_low, low);
    seen_high = std::max(seen_high, task.at[r] + 1);
  }
  for (int64_t block = task.begin / BLOCK_ROWS * BLOCK_ROWS; block < task.end; block += BLOCK_ROWS) {
    const int64_t low = std::max({block, task.begin, seen_low});
    const int64_t high = std::min({block + BLOCK_ROWS, task.end, seen_high});
    if (low >= high) continue;
    const Page& page = task.pages[block / PAGE];
    const int64_t first = low % PAGE, skipped = low - block, count = high - low;
    decode(keys, page.keys.get(), task.head, first, count, tile + skipped * keys.padded);
    score(task.queries, task.rows, tile + skipped / 4 * 4 * keys.padded, keys.padded, high - block - skipped / 4 * 4,
          false, scores + skipped / 4 * 4);
    if (task.base) {
      const int64_t from = skipped / 4 * 4;
      score(task.base, task.rows, task.table + (block + from) * task.base_width, task.base_width, high - block - from,
            true, scores + from);
    }
    for (int32_t r = 0; r < task.rows; ++r) {
      float* mine = scores + r * BLOCK_ROWS;
      if (task.base && block == 0 && low == 0) mine[0] += task.first[r];
      if (task.cap > 0) cap(mine, BLOCK_ROWS, task.cap);
      const int64_t from = std::max(low, task.window ? task.at[r] - task.window + 1 : 0) - block;
      const int64_t to = std::min(high, task.at[r] + 1) - block;
      soften(mine, from, to, task.most[r], task.total[r], task.sums + int64_t{r} * values.padded, values.padded);
    }
    decode(values, page.values.get(), task.head, first, count, tile);
    // Weights before `skipped` are 0: they are left out, which changes no sum.
    for (int32_t r = 0; skipped && r < task.rows; ++r) {
      std::copy_n(scores + r * BLOCK_ROWS + skipped, count, scores + r * BLOCK_ROWS);
    }
    weigh(scores, task.rows, tile, values.padded, count, task.sums);
  }
}

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
