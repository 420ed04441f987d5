// Viterbi's search for the codes of least squared error, once for each instruction set: included inside a namespace,
// after its lanes of W bytes. src/paley/core/trellis.py has its meaning: integers, and float32 operations rounded one
// by one, in its order.

constexpr uint8_t NEVER = 255;

// The rows of one thread, one after the other. P: values of a step; K: codes of a step.
template <int P, int K>
struct Search {
  static constexpr int size = 1 << TRELLIS_STATE_BITS, overlaps = size / K;
  const TrellisTask& task;
  const int bits = task.trellis.bits, levels = task.trellis.levels;
  const int steps = (task.columns + P - 1) / P, all_steps = (task.wide + P - 1) / P;
  const int most = std::min(task.keep + task.ahead, all_steps);
  std::vector<uint8_t> cost = std::vector<uint8_t>((most + size_t{1}) * overlaps);
  std::vector<int32_t> y = std::vector<int32_t>(size_t{1} * most * P);  // levels
  std::vector<float> work = std::vector<float>(size_t{1} * all_steps * P);
  std::vector<int32_t> found = std::vector<int32_t>(most);

  explicit Search(const TrellisTask& task) : task(task) {}

  // The costs of all states: of the i-th of their values, at its level.
  const uint8_t* costs_at(const int32_t* at, int i) const {
    return task.trellis.costs + (size_t{1} * i * levels + at[i]) * size;
  }

  // before, after [overlaps]: the least cost of each way to share low bits with the next state. State s comes from
  // overlap s / K, and its low bits are s % overlaps.
  PALEY_INLINE void step(const int32_t* at, const uint8_t* before, uint8_t* after) const {
    const uint8_t* costs[P];
    for (int i = 0; i < P; ++i) costs[i] = costs_at(at, i);
    Bytes least = all(NEVER);
    for (size_t t = 0; t < overlaps; t += W) {
      Bytes best = all(NEVER);
      PALEY_UNROLL_16 for (size_t j = 0; j < K; ++j) {
        Bytes sum = spread_over<K>(before + t / K + j * overlaps / K);
        for (int i = 0; i < P; ++i) sum = plus(sum, load(costs[i] + t + j * overlaps));
        best = min(sum, best);
      }
      store(after + t, best);
      least = min(best, least);
    }
    const uint8_t low = least_of(least);
    if (low == 0) return;
    for (int t = 0; t < overlaps; t += W) store(after + t, minus(load(after + t), all(low)));
  }

  // -> which of the states with these low bits had the least cost, the first of equal ones. Those of `known` bits must
  // be those of `start`.
  int chosen(const int32_t* at, const uint8_t* before, int overlap, int known, int start) const {
    uint32_t keys[K], best = ~uint32_t{0};
    const uint8_t* costs[P];
    for (int i = 0; i < P; ++i) costs[i] = costs_at(at, i) + overlap;
    for (int j = 0; j < K; ++j) {
      uint32_t sum = before[(j * overlaps + overlap) / K];
      for (int i = 0; i < P; ++i) sum += costs[i][j * overlaps];
      keys[j] = std::min<uint32_t>(sum, NEVER);
    }
    for (int j = 0; j < K && known; ++j) {
      if (((j * overlaps + overlap) ^ start) & known) keys[j] = NEVER + 1;
    }
    for (int j = 0; j < K; ++j) best = std::min(best, keys[j] << 8 | static_cast<uint32_t>(j));
    return static_cast<int>(best & 255) * overlaps + overlap;
  }

  // y [count, P] -> found [count]: the states of the best path from `state` on, and to the overlap `last` if it is one.
  void run(int count, int32_t state, int32_t last) {
    std::fill(cost.begin(), cost.begin() + overlaps, state < 0 ? 0 : NEVER);
    if (state >= 0) cost[state & (overlaps - 1)] = 0;
    const auto costs = [this](int i) { return cost.data() + size_t{1} * i * overlaps; };
    for (int i = 0; i < count; ++i) step(y.data() + i * P, costs(i), costs(i + 1));
    int at = last >= 0 ? last
                       : static_cast<int>(std::min_element(costs(count), costs(count) + overlaps) - costs(count));
    for (int i = count - 1; i >= 0; --i) {
      // The first states hold bits of that before.
      const int moved = (i + 1) * bits, known = state < 0 || moved >= TRELLIS_STATE_BITS ? 0 : size - (1 << moved);
      found[i] = chosen(y.data() + i * P, costs(i), at, known, known ? state << moved : 0);
      at = found[i] / K;
    }
  }

  // The nearest level, of two the even one.
  int32_t level(float x) const {
    const int32_t reach = levels / 2;
    const float far = static_cast<float>(reach);
    x = x > -far ? x : -far;
    x = x < far ? x : far;
    return static_cast<int32_t>((x + 0x1.8p23f) - 0x1.8p23f) + reach;
  }

  void row(int r) {
    const float* x = task.x + r * task.x_row;
    const float* scales = task.scales + r * task.scale_row;
    std::copy(x, x + task.wide, work.begin());
    std::fill(work.begin() + task.wide, work.end(), 0.0f);
    int32_t state = task.states[r];
    for (int start = 0; start < steps; start += task.keep) {
      const int stop = std::min(start + task.keep, steps), end = std::min(stop + task.ahead, all_steps);
      for (int i = start * P; i < end * P; ++i) {
        const float value = i < task.wide ? work[i] / scales[i * task.scale_column] : 0.0f;
        y[i - start * P] = level(value * task.trellis.unit);
      }
      run(end - start, state, task.ends && end == all_steps ? task.ends[r] & (overlaps - 1) : -1);
      for (int i = start; i < stop; ++i) task.codes[int64_t{r} * steps + i] = found[i - start] & (K - 1);
      state = found[stop - 1 - start];
      if (task.matrix) spread(r, start * P, std::min(stop * P, task.columns), scales);
    }
    task.states[r] = state;
  }

  // The columns from first to last are rounded together: the feedback between their errors is taken back.
  void spread(int r, int first, int last, const float* scales) {
    float* errors = task.errors + int64_t{r} * task.columns;
    for (int i = first; i < last; ++i) {
      const int32_t s = found[(i - first) / P];
      const float point = task.trellis.points[size_t{1} * ((i - first) % P) * size + s];
      float e = work[i] - point * scales[i * task.scale_column];
      for (int k = first; k < i; ++k) e -= errors[k] * task.matrix[int64_t{k} * task.wide + i];
      errors[i] = e / task.matrix[int64_t{i} * task.wide + i];
    }
    for (int i = first; i < last; ++i) {
      const float* m = task.matrix + int64_t{i} * task.wide;
      for (int k = last; k < task.wide; ++k) work[k] -= errors[i] * m[k];
    }
  }
};

template <int P, int K>
void search(const TrellisTask& task) {
  std::atomic<int> next{0};
  run_workers(task.threads, [&] {
    Search<P, K> searching(task);
    for (int r; (r = next.fetch_add(1)) < task.rows;) searching.row(r);
  });
}

template <int P>
void search_of(const TrellisTask& task) {
  switch (task.trellis.bits) {
    case 1: return search<P, 2>(task);
    case 2: return search<P, 4>(task);
    case 3: return search<P, 8>(task);
    case 4: return search<P, 16>(task);
    case 5: return search<P, 32>(task);
    case 6: return search<P, 64>(task);
    case 7: return search<P, 128>(task);
  }
}

void trellis(const TrellisTask& task) { task.trellis.p == 1 ? search_of<1>(task) : search_of<2>(task); }
