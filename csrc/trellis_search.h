// Viterbi's search for the codes of least squared error, once for each instruction set: included inside a namespace,
// after its lanes of W bytes. src/paley/core/viterbi.py has its meaning: integers, and float32 operations rounded one
// by one, in its order. A step has the sums of all paths by overlap, the low bits of a state that the next one has as
// its high bits: state s comes from overlap s / K and leads to overlap s % overlaps. `step` makes those after it, less
// the least of them; `sum` is that of one state.

// Costs of a step's states in 8 bits, from the table's list for each of its levels. Sums that do not fit become MOST.
template <int P, int K>
struct Listed {
  using Sum = uint8_t;
  using Key = uint32_t;  // of a sum and one of K states
  static constexpr Sum MOST = 255;
  const uint8_t* costs[P];

  Listed(const paley_trellis& grid, const int32_t* levels) {
    for (int i = 0; i < P; ++i) {
      const int32_t place = levels[i] + grid.level_count / 2;
      costs[i] = grid.costs + (size_t{1} * i * grid.level_count + place) * STATES;
    }
  }

  Sum sum(Sum before, size_t state) const {
    int of_state = before;
    for (int i = 0; i < P; ++i) of_state += costs[i][state];
    return static_cast<Sum>(std::min<int>(of_state, MOST));
  }

  void step(const Sum* before, Sum* after) const {
    constexpr size_t overlaps = STATES / K;
    Bytes least = all(MOST);
    for (size_t t = 0; t < overlaps; t += W) {
      Bytes best = all(MOST);
      PALEY_UNROLL_16 for (size_t j = 0; j < K; ++j) {
        Bytes of_states = repeated<K>(before + t / K + j * overlaps / K);
        for (int i = 0; i < P; ++i) of_states = plus(of_states, load(costs[i] + t + j * overlaps));
        best = min(of_states, best);
      }
      store(after + t, best);
      least = min(best, least);
    }
    const uint8_t low = least_of(least);
    if (low == 0) return;
    for (size_t t = 0; t < overlaps; t += W) store(after + t, minus(load(after + t), all(low)));
  }
};

// Squared distances of levels.
template <int P, int K>
struct Squared {
  using Sum = int32_t;
  using Key = uint64_t;
  static constexpr Sum MOST = 1 << 30;
  const int32_t* values[P];
  int32_t levels[P];

  Squared(const paley_trellis& grid, const int32_t* at) {
    for (int i = 0; i < P; ++i) levels[i] = at[i], values[i] = grid.levels + size_t{1} * i * STATES;
  }

  PALEY_INLINE Sum sum(Sum before, size_t state) const {
    for (int i = 0; i < P; ++i) before += (levels[i] - values[i][state]) * (levels[i] - values[i][state]);
    return std::min(before, MOST);
  }

  void step(const Sum* before, Sum* after) const {
    constexpr size_t overlaps = STATES / K;
    Sum sums[STATES], least[overlaps], low = MOST;
    for (size_t i = 0; i < overlaps; ++i) std::fill(sums + i * K, sums + (i + 1) * K, before[i]);
    for (size_t i = 0; i < STATES; ++i) sums[i] = sum(sums[i], i);
    std::copy(sums, sums + overlaps, least);
    for (size_t j = overlaps; j < STATES; j += overlaps) {
      for (size_t t = 0; t < overlaps; ++t) least[t] = std::min(least[t], sums[j + t]);
    }
    for (const Sum sum : least) low = std::min(low, sum);
    for (size_t t = 0; t < overlaps; ++t) after[t] = least[t] - low;
  }
};

// The rows of one thread, one after the other. P: values of a step; K: codes of a step.
template <int P, int K>
struct Search {
  static constexpr int overlaps = STATES / K;
  const TrellisTask& task;
  const int steps = (task.columns + P - 1) / P, all_steps = (task.wide + P - 1) / P;
  const int most = std::min(task.keep + task.ahead, all_steps);
  std::vector<uint8_t> listed = std::vector<uint8_t>((most + size_t{1}) * overlaps);
  std::vector<int32_t> squared;  // made if a row needs it
  std::vector<int32_t> y = std::vector<int32_t>(size_t{1} * most * P);  // levels
  std::vector<float> work = std::vector<float>(size_t{1} * all_steps * P);
  std::vector<int32_t> found = std::vector<int32_t>(most);

  explicit Search(const TrellisTask& task) : task(task) {}

  // Levels y [count, P] -> found [count]: the states of the path of least cost from `state` on, -1: any, to the overlap
  // `last`, -1: any; of equal ones the first. false: it has a sum of MOST.
  template <class Costs>
  bool path(int count, int32_t state, int32_t last, std::vector<typename Costs::Sum>& sums) {
    using Sum = typename Costs::Sum;
    const auto costs = [this](int i) { return Costs(task.trellis, y.data() + i * P); };
    const auto before = [&sums](int i) { return sums.data() + size_t{1} * i * overlaps; };
    std::fill(before(0), before(1), state < 0 ? Sum{0} : Costs::MOST);
    if (state >= 0) sums[state % overlaps] = 0;
    for (int i = 0; i < count; ++i) costs(i).step(before(i), before(i + 1));
    const Sum* ends = before(count);
    int at = last >= 0 ? last : static_cast<int>(std::min_element(ends, ends + overlaps) - ends);
    bool sure = true;
    for (int i = count - 1; i >= 0; --i) {
      const Costs of_step = costs(i);
      typename Costs::Key keys[K], best = ~typename Costs::Key{0};
      for (uint32_t j = 0; j < K; ++j) {
        const uint32_t s = j * overlaps + at;
        keys[j] = static_cast<typename Costs::Key>(of_step.sum(before(i)[s / K], s)) << 8 | j;
      }
      for (const auto key : keys) best = std::min(best, key);
      sure = sure && best >> 8 < Costs::MOST;
      found[i] = static_cast<int32_t>(best & 255) * overlaps + at;
      at = found[i] / K;
    }
    return sure;
  }

  // The nearest level, of two the even one; of NaN the lowest.
  static int32_t level(float x) {
    constexpr float farthest = FARTHEST;
    x = x > -farthest ? x : -farthest;
    x = x < farthest ? x : farthest;
    return static_cast<int32_t>((x + 0x1.8p23f) - 0x1.8p23f);
  }

  void row(int r) {
    const float* x = task.x + r * task.x_row;
    const float* scales = task.scales + r * task.scale_row;
    std::copy(x, x + task.wide, work.begin());
    std::fill(work.begin() + task.wide, work.end(), 0.0f);
    int32_t state = task.states[r];
    for (int start = 0; start < steps; start += task.keep) {
      const int stop = std::min(start + task.keep, steps), end = std::min(stop + task.ahead, all_steps);
      const int32_t reach = task.trellis.level_count / 2;
      bool listed_all = true;
      for (int i = start * P; i < end * P; ++i) {
        const float value = i < task.wide ? work[i] / scales[i * task.scale_column] : 0.0f;
        y[i - start * P] = level(value * task.trellis.unit);
        listed_all = listed_all && std::abs(y[i - start * P]) <= reach;
      }
      const int32_t last = task.ends && end == all_steps ? task.ends[r] % overlaps : -1;
      if (!listed_all || !path<Listed<P, K>>(end - start, state, last, listed)) {
        squared.resize((most + size_t{1}) * overlaps);
        path<Squared<P, K>>(end - start, state, last, squared);
      }
      for (int i = start; i < stop; ++i) task.codes[int64_t{r} * steps + i] = found[i - start] % K;
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
      const float point = task.trellis.points[size_t{1} * ((i - first) % P) * STATES + s];
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
