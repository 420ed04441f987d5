// The steps, once for each instruction set: included inside a namespace after wide_*.h. See steps.h.

PALEY_INLINE F load(const float* p) {
  F a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }

// f of n values, L at a time; the last ones through a copy.
template <class Map>
PALEY_INLINE void map(int64_t n, const float* a, const float* b, float* y, const Map& f) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, f(load(a + i), load(b + i)));
  if (i == n) return;
  float last[3][L] = {};
  std::copy(a + i, a + n, last[0]);
  std::copy(b + i, b + n, last[1]);
  store(last[2], f(load(last[0]), load(last[1])));
  std::copy(last[2], last[2] + (n - i), y + i);
}

void norm(const float* x, int64_t x_stride, int64_t rows, const float* gain, int32_t size, float epsilon, float* y,
          int64_t y_stride, bool adds) {
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += y_stride) {
    F squares[2] = {all(0.0f), all(0.0f)};
    int32_t i = 0;
    for (; i + 2 * L <= size; i += 2 * L) {
      for (int k = 0; k < 2; ++k) squares[k] = fused(load(x + i + L * k), load(x + i + L * k), squares[k]);
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < size; ++i) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
    const F wide = all(factor);
    for (i = 0; i + L <= size; i += L) {
      const F found = load(x + i) * wide * load(gain + i);
      store(y + i, adds ? load(y + i) + found : found);
    }
    for (; i < size; ++i) {
      const float found = x[i] * factor * gain[i];
      y[i] = adds ? y[i] + found : found;
    }
  }
}

void rotate(float* x, int32_t heads, int32_t size, const float* table, int32_t width, bool interleaved) {
  const int32_t half = width / 2;
  const float *cosine = table, *sine = table + half;
  for (int32_t head = 0; interleaved && head < heads; ++head, x += size) {
    for (int32_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
  }
  if (interleaved) return;
  for (int32_t head = 0; head < heads; ++head, x += size) {
    int32_t i = 0;
    for (; i + L <= half; i += L) {
      const F a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
      store(x + i, a * c - b * s);
      store(x + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosine[i] - b * sine[i];
      x[half + i] = b * cosine[i] + a * sine[i];
    }
  }
}

void base(const float* q, const float* m, int32_t width, bool interleaved, float* found) {
  const int32_t half = width / 2;
  for (int32_t i = 0; i < half; ++i) {
    const int32_t a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : half + i;
    found[i] = q[a] * m[a] + q[b] * m[b];
    found[half + i] = q[b] * m[a] - q[a] * m[b];
  }
}

void gate(const float* g, const float* up, int64_t n, int32_t activation, float* y) {
  const F one = all(1.0f);
  if (activation == PALEY_SILU) {
    map(n, g, up, y, [&](F a, F b) { return a / (one + exponential(-a)) * b; });
  } else if (activation == PALEY_GELU_TANH) {
    map(n, g, up, y, [&](F a, F b) {
      const F inner = all(1.5957691216f) * a * fused(all(0.044715f), a * a, one);  // 2 sqrt(2 / pi)
      return a / (one + exponential(-inner)) * b;
    });
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = 0.5f * g[i] * (1.0f + std::erf(g[i] * 0.70710678f)) * up[i];
  }
}

PALEY_INLINE F capped(F x, F cap, F twice) {  // cap tanh(x / cap)
  return cap - (cap + cap) / (all(1.0f) + exponential(x * twice));
}

void cap(float* x, int64_t n, float most) {
  const F limit = all(most), twice = all(2.0f / most);
  map(n, x, x, x, [&](F a, F) { return capped(a, limit, twice); });
}

// --- products with a plain weight ----------------------------------------------------------------------------

template <int STORED>
PALEY_INLINE F weights(const void* from, int64_t at) {
  if constexpr (STORED == FLOAT32) return load(static_cast<const float*>(from) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
  return STORED == BFLOAT16 ? from_bfloat(halves) : from_half(halves);
}

template <int STORED>
PALEY_INLINE float one_weight(const void* from, int64_t at) {
  if constexpr (STORED == FLOAT32) return static_cast<const float*>(from)[at];
  const uint16_t half = static_cast<const uint16_t*>(from)[at];
  if constexpr (STORED == FLOAT16) return one_from_half(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// R rows of the weight times T tokens. Each sum is one vector's lanes, then the columns that fill no vector.
template <int STORED, int R, int T>
PALEY_INLINE void tile(const PlainTask& task, int64_t row, int64_t token) {
  F found[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) found[r][t] = all(0.0f);
  }
  const float* x = task.x + token * task.x_stride;
  int64_t i = 0;
  for (; i + L <= task.in; i += L) {
    F values[T];
    for (int t = 0; t < T; ++t) values[t] = load(x + t * task.x_stride + i);
    for (int r = 0; r < R; ++r) {
      const F w = weights<STORED>(task.weight, (row + r) * task.in + i);
      for (int t = 0; t < T; ++t) found[r][t] = fused(values[t], w, found[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      float total = sum(found[r][t]);
      for (int64_t k = i; k < task.in; ++k) {
        total += x[t * task.x_stride + k] * one_weight<STORED>(task.weight, (row + r) * task.in + k);
      }
      if (task.bias) total += task.bias[row + r];
      total *= task.factor;
      float* to = task.y + (token + t) * task.y_stride + row + r;
      *to = task.adds ? *to + total : total;
    }
  }
}

template <int STORED>
void plain_rows(const PlainTask& task) {
  if (task.tokens == 1) {
    int64_t row = task.begin;
    for (; row + 8 <= task.end; row += 8) tile<STORED, 8, 1>(task, row, 0);
    for (; row < task.end; ++row) tile<STORED, 1, 1>(task, row, 0);
    return;
  }
  for (int64_t row = task.begin; row < task.end;) {
    if (row + 4 <= task.end) {
      int64_t token = 0;
      for (; token + 3 <= task.tokens; token += 3) tile<STORED, 4, 3>(task, row, token);
      for (; token < task.tokens; ++token) tile<STORED, 4, 1>(task, row, token);
      row += 4;
    } else {
      for (int64_t token = 0; token < task.tokens; ++token) tile<STORED, 1, 1>(task, row, token);
      ++row;
    }
  }
}

void plain(const PlainTask& task) {
  if (task.stored == FLOAT32) {
    plain_rows<FLOAT32>(task);
  } else if (task.stored == BFLOAT16) {
    plain_rows<BFLOAT16>(task);
  } else {
    plain_rows<FLOAT16>(task);
  }
}
