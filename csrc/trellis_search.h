// Viterbi's search for the codes of least squared error, once for each instruction set: included inside a namespace,
// after its lanes. src/paley/core/trellis.py has its meaning: float32 operations are rounded one by one, in its order.

constexpr float NEVER = 1e30f;

// The rows of one thread, one after the other. P: values of a step; K: codes of a step.
template <int P, int K>
struct Search {
  const TrellisTask& task;
  const int size = 1 << task.trellis.state_bits, overlaps = size / K;
  const int steps = (task.columns + P - 1) / P, all_steps = (task.wide + P - 1) / P;
  const int most = std::min(task.keep + task.ahead, all_steps);
  std::vector<float> cost = std::vector<float>((most + size_t{1}) * overlaps), wide = std::vector<float>(size);
  std::vector<float> work = std::vector<float>(size_t{1} * all_steps * P), y = std::vector<float>(size_t{1} * most * P);
  std::vector<int32_t> found = std::vector<int32_t>(most);

  explicit Search(const TrellisTask& task) : task(task) {}

  // before, after [overlaps]: the least cost of each way to share low bits with the next state. State s comes from
  // overlap s / K, and its low bits are s % overlaps.
  PALEY_INLINE void step(const float* values, const float* before, float* after) {
    if constexpr (K < W) {
      for (int t = 0; t < overlaps; ++t) {
        for (int c = 0; c < K; ++c) wide[t * K + c] = before[t];
      }
    }
    const float* points = task.trellis.points;
    for (int t = 0; t < overlaps; t += W) {
      Floats best = all(NEVER);
      for (int s = t; s < size; s += overlaps) {
        Floats sum = K < W ? load(wide.data() + s) : all(before[s / K]);
        for (int i = 0; i < P; ++i) {
          const Floats off = all(values[i]) - load(points + size_t{1} * i * size + s);
          sum = sum + off * off;
        }
        best = min(sum, best);
      }
      store(after + t, best);
    }
  }

  // -> which of the states with these low bits had the least cost, the first of equal ones.
  int chosen(const float* values, const float* before, int overlap) const {
    float best = INFINITY;
    int found_at = overlap;
    for (int s = overlap; s < size; s += overlaps) {
      float sum = before[s / K];
      for (int i = 0; i < P; ++i) {
        const float off = values[i] - task.trellis.points[size_t{1} * i * size + s];
        sum = sum + off * off;
      }
      if (sum < best) best = sum, found_at = s;
    }
    return found_at;
  }

  // y [count, P] -> found [count]: the states of the best path from `state` on, and to the overlap `last` if it is one.
  void run(int count, int32_t state, int32_t last) {
    std::fill(cost.begin(), cost.begin() + overlaps, state < 0 ? 0.0f : NEVER);
    if (state >= 0) cost[state & (overlaps - 1)] = 0.0f;
    const auto costs = [this](int i) { return cost.data() + size_t{1} * i * overlaps; };
    for (int i = 0; i < count; ++i) step(y.data() + i * P, costs(i), costs(i + 1));
    int at = last >= 0 ? last : static_cast<int>(std::min_element(costs(count), costs(count) + overlaps) - costs(count));
    for (int i = count - 1; i >= 0; --i) {
      found[i] = chosen(y.data() + i * P, costs(i), at);
      at = found[i] / K;
    }
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
        y[i - start * P] = i < task.wide ? work[i] / scales[i * task.scale_column] : 0.0f;
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
