// The exact search for nearest points, once for each instruction set: included inside a namespace after its lanes.
//
// Two ideas. First, vectors are sorted into cells; a point that scores below another on a whole cell is never compared
// with the vectors there, so that of thousands of points some tens remain. Second, the rest is compared in float32,
// and again in float64 wherever best and second best are closer than float32 can tell apart: codes are exact.
//
// Error bound: with u = 2^-24, a float32 score -|c|^2/2 + sum x_i c_i has at most 2P + 1 roundings, fused or not, each
// below u (|c|^2/2 + sum |x_i c_i|); an underflow adds less than FLT_MIN each. A bound that overflows decides nothing.

constexpr int MAX_CELLS = 256;  // of one split; a cell fits in uint8_t
constexpr int MAX_DEPTH = 4;    // splits of splits
constexpr int FEW_POINTS = 24;  // are compared without a split
constexpr int PER_CELL = 32;    // vectors that a cell should have on average at least

// Vectors, an array for each coordinate, and where in the codes each belongs.
template <int P>
struct Cloud {
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> place;
  float* x[P];

  explicit Cloud(int64_t capacity) : floats(new float[P * (capacity + W)]), place(new int32_t[capacity]) {
    for (int i = 0; i < P; ++i) x[i] = floats.get() + i * (capacity + W);
  }

  // Whole groups of W are read, also at the end.
  void pad(int64_t count) {
    for (int i = 0; i < P; ++i) std::fill_n(x[i] + count, W, 0.0f);
  }

  Box<P> box_of(int64_t begin, int64_t count) const {
    Box<P> box;
    const int64_t whole = count / W * W;
    for (int i = 0; i < P; ++i) {
      const float* a = x[i] + begin;
      box.low[i] = box.high[i] = a[0];
      if (whole) range_of(a, static_cast<int>(whole), box.low[i], box.high[i]);
      for (int64_t v = whole; v < count; ++v) {
        box.low[i] = std::min(box.low[i], a[v]);
        box.high[i] = std::max(box.high[i], a[v]);
      }
    }
    return box;
  }
};

// One thread's search.
template <int P>
struct Search {
  const NearestTask& task;
  const List<P>& points;
  Cloud<P> first, second;
  std::unique_ptr<uint8_t[]> cell;
  std::unique_ptr<float[]> scores;
  std::unique_ptr<List<P>> lists[MAX_DEPTH];  // the candidates of the cell at hand, for each depth
  int32_t* codes = nullptr;                   // of the piece at hand

  Search(const NearestTask& task, const List<P>& points, int64_t capacity)
      : task(task),
        points(points),
        first(capacity),
        second(capacity),
        cell(new uint8_t[capacity]),
        scores(new float[points.size + W]) {
    for (auto& list : lists) list.reset(new List<P>(points.size));
  }

  void run(int64_t begin, int64_t count) {
    const float* x = task.x + begin * P;
    codes = task.codes + begin;
    for (int i = 0; i < P; ++i) {
      for (int64_t v = 0; v < count; ++v) {
        float a = x[v * P + i];
        a = a == a ? a : 0.0f;
        a = a < FLT_MAX ? a : FLT_MAX;
        first.x[i][v] = a > -FLT_MAX ? a : -FLT_MAX;
      }
    }
    for (int64_t v = 0; v < count; ++v) first.place[v] = static_cast<int32_t>(v);
    first.pad(count);
    second.pad(count);
    solve(first, second, 0, count, points, first.box_of(0, count), 0);
  }

  // Codes of the vectors [begin, begin + count) of `here`, which lie in `box` and whose nearest points are in `list`.
  // `there` lends the same range.
  void solve(Cloud<P>& here, Cloud<P>& there, int64_t begin, int64_t count, const List<P>& list, const Box<P>& box,
             int depth) {
    int parts[P];
    Box<P> cut;
    const int64_t most_cells = std::min<int64_t>(MAX_CELLS, count / PER_CELL);
    if (list.size <= FEW_POINTS || depth == MAX_DEPTH || !choose_parts(list.box, box, most_cells, cut, parts)) {
      compare(here, begin, count, list);
      return;
    }
    int64_t ends[MAX_CELLS + 1];
    const int cells = sort_into_cells(here, there, begin, count, cut, parts, ends);
    List<P>& kept = *lists[depth];
    for (int k = 0; k < cells; ++k) {
      const int64_t size = ends[k + 1] - ends[k];
      if (size == 0) continue;
      const Box<P> inner = there.box_of(ends[k], size);
      prune(list, inner, scores.get(), kept);
      solve(there, here, ends[k], size, kept, inner, depth + 1);
    }
  }

  // Where cells are: `cut`, each side in several parts, the longest side in the most. False if nothing can be cut.
  // It ends where the points end, so that far vectors, which fall into the outer cells, do not make cells coarse.
  static bool choose_parts(const Box<P>& points, const Box<P>& vectors, int64_t most_cells, Box<P>& cut, int* parts) {
    float length[P];
    int64_t cells = 1;
    for (int i = 0; i < P; ++i) {
      parts[i] = 1;
      cut.low[i] = std::max(points.low[i], vectors.low[i]);
      cut.high[i] = std::min(points.high[i], vectors.high[i]);
      length[i] = cut.high[i] - cut.low[i];
    }
    for (;;) {
      int longest = -1;
      for (int i = 0; i < P; ++i) {
        if (!(length[i] > 0 && length[i] <= FLT_MAX) || cells / parts[i] * (parts[i] + 1) > most_cells) continue;
        if (longest < 0 || length[i] / parts[i] > length[longest] / parts[longest]) longest = i;
      }
      if (longest < 0) return cells > 1;
      cells = cells / parts[longest] * (parts[longest] + 1);
      ++parts[longest];
    }
  }

  // Moves the vectors to the same range of `there`; cell k gets [ends[k], ends[k + 1]). -> number of cells.
  int sort_into_cells(const Cloud<P>& here, Cloud<P>& there, int64_t begin, int64_t count, const Box<P>& cut,
                      const int* parts, int64_t* ends) {
    int cells = 1;
    std::fill_n(cell.get(), count, uint8_t{0});
    for (int i = 0; i < P; ++i) {
      if (parts[i] == 1) continue;
      const float low = cut.low[i], scale = static_cast<float>(parts[i]) / (cut.high[i] - low);
      const float last = static_cast<float>(parts[i] - 1);
      const float* x = here.x[i] + begin;
      uint8_t* to = cell.get();
      for (int64_t v = 0; v < count; ++v) {
        float part = (x[v] - low) * scale;
        part = part < last ? part : last;  // NaN too, from 0 times infinity
        part = part > 0.0f ? part : 0.0f;
        to[v] = static_cast<uint8_t>(to[v] + static_cast<int32_t>(part) * cells);
      }
      cells *= parts[i];
    }
    int64_t next[MAX_CELLS] = {};
    for (int64_t v = 0; v < count; ++v) ++next[cell[v]];
    ends[0] = begin;
    for (int k = 0; k < cells; ++k) {
      ends[k + 1] = ends[k] + next[k];
      next[k] = ends[k];
    }
    for (int64_t v = 0; v < count; ++v) {
      const int64_t to = next[cell[v]]++;
      for (int i = 0; i < P; ++i) there.x[i][to] = here.x[i][begin + v];
      there.place[to] = here.place[begin + v];
    }
    return cells;
  }

  // Each vector against each point of the list.
  void compare(const Cloud<P>& cloud, int64_t begin, int64_t count, const List<P>& list) {
    const Floats rounding = all((4 * P + 6) * 0.5f * FLT_EPSILON), underflow = all((4 * P + 6) * FLT_MIN);
    for (int64_t from = begin; from < begin + count; from += W) {
      Floats x[P], best = all(LOWEST), runner_up = best, reach = all(list.most_bias);
      Ints at = all(0);
      for (int i = 0; i < P; ++i) x[i] = load(cloud.x[i] + from);
      for (int j = 0; j < list.size; ++j) {
        Floats score = all(list.bias[j]);
        for (int i = 0; i < P; ++i) score = fma(x[i], all(list.c[i][j]), score);
        at = select(greater(score, best), all(j), at);
        runner_up = max(runner_up, min(best, score));
        best = max(best, score);
      }
      for (int i = 0; i < P; ++i) reach = fma(abs(x[i]), all(list.most[i]), reach);
      const Mask clear = greater(sub(best, runner_up), fma(reach, rounding, underflow));

      int32_t winner[W];
      store(winner, at);
      const int size = static_cast<int>(std::min<int64_t>(W, begin + count - from));
      for (uint32_t close = ~bits(clear) & lanes_below(size); close; close &= close - 1) {
        const int k = lowest_bit(close);
        winner[k] = exact(cloud, from + k, list);
      }
      for (int k = 0; k < size; ++k) codes[cloud.place[from + k]] = list.index[winner[k]];
    }
  }

  // The position in the list, as paley.h defines it. Products of float32 are exact in float64: only sums round.
  static int32_t exact(const Cloud<P>& cloud, int64_t v, const List<P>& list) {
    double best = -INFINITY;
    int32_t at = 0;
    for (int j = 0; j < list.size; ++j) {
      double square = 0;
      for (int i = 0; i < P; ++i) square += static_cast<double>(list.c[i][j]) * list.c[i][j];
      double score = -0.5 * square;
      for (int i = 0; i < P; ++i) score += static_cast<double>(cloud.x[i][v]) * list.c[i][j];
      if (score > best) {
        best = score;
        at = j;
      }
    }
    return at;
  }
};

// Vectors that one thread takes at a time: enough for cells that are small compared with the distances of points,
// and few enough for the caches.
inline int64_t piece_of(const NearestTask& task) {
  const int64_t share = (task.count + task.threads - 1) / task.threads;
  return std::min(share, std::min<int64_t>(std::max<int64_t>(128 * int64_t{task.n}, 1 << 15), 1 << 19));
}

template <int P>
void nearest_in(const NearestTask& task) {
  List<P> points(task.n);
  for (int j = 0; j < task.n; ++j) {
    double square = 0;
    for (int i = 0; i < P; ++i) {
      const float c = task.points[int64_t{j} * P + i];
      points.c[i][j] = c;
      square += static_cast<double>(c) * c;
    }
    points.bias[j] = static_cast<float>(-0.5 * square);
    points.index[j] = j;
  }
  points.size = task.n;
  points.finish();

  const int64_t piece = piece_of(task);
  std::atomic<int64_t> next{0};
  run_workers(task.threads, [&] {
    if (next.load() >= task.count) return;
    Search<P> search(task, points, piece);
    for (int64_t begin; (begin = next.fetch_add(piece)) < task.count;) {
      search.run(begin, std::min(piece, task.count - begin));
    }
  });
}

void nearest(const NearestTask& task) {
  switch (task.p) {
    case 1: return nearest_in<1>(task);
    case 2: return nearest_in<2>(task);
    case 3: return nearest_in<3>(task);
    case 4: return nearest_in<4>(task);
    case 5: return nearest_in<5>(task);
    case 6: return nearest_in<6>(task);
    case 7: return nearest_in<7>(task);
    case 8: return nearest_in<8>(task);
  }
}
