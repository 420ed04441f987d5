// Tries scales for groups of values, once for each instruction set: included inside a namespace after mean.h.
//
// Each float32 operation is rounded by itself, in the order of the torch reference (src/paley/methods/nearest.py): the
// results are the same to the bit on every level.

// One at a time on a thread.
class ScaleSearch {
 public:
  explicit ScaleSearch(const ScalesTask& task)
      : task_(task), size_(task.size), at_(new float[size_]), points_(new float[size_]) {}

  int32_t best(int64_t group) const {
    const float* x = task_.x + group * size_;
    const float* importance = task_.importance ? task_.importance + group % task_.period * size_ : nullptr;
    int32_t best = 0;
    float least = INFINITY;
    for (int32_t k = 0; k < task_.tries; ++k) {
      const int64_t at = group * task_.tries + k;
      const float error = error_of(x, importance, task_.scales[at], task_.zeros ? task_.zeros[at] : 0.0f);
      if (error < least) {
        least = error;
        best = k;
      }
    }
    return best;
  }

 private:
  float error_of(const float* x, const float* importance, float scale, float zero) const {
    float *y = at_.get(), *points = points_.get();
    for (int i = 0; i < size_; ++i) y[i] = x[i] / scale + zero;
    const float step = task_.table.step;
    step == 1.0f ? even<true>(y, points) : step > 0 ? even<false>(y, points) : search(y, points);
    for (int i = 0; i < size_; ++i) {
      const float error = (points[i] - zero) * scale - x[i];
      y[i] = error * error;
    }
    if (importance) {
      for (int i = 0; i < size_; ++i) y[i] *= importance[i];
    }
    return mean_of(y, size_);
  }

  // y [size] -> the points nearest to them.
  template <bool WHOLE>
  void even(const float* y, float* points) const {
    const float first = task_.table.first, step = task_.table.step, last = static_cast<float>(task_.table.n - 1);
    for (int i = 0; i < size_; ++i) {
      float at = WHOLE ? y[i] - first : (y[i] - first) / step;
      at = at > 0.0f ? at : 0.0f;  // NaN too
      at = at < last ? at : last;
      points[i] = ((at + ROUNDER) - ROUNDER) * step + first;
    }
  }

  void search(const float* y, float* points) const {
    const paley_table& table = task_.table;
    std::fill_n(points, size_, table.points[0]);
    for (int32_t k = 0; k + 1 < table.n; ++k) {
      const float edge = table.edges[k], point = table.points[k + 1];
      for (int i = 0; i < size_; ++i) points[i] = y[i] > edge ? point : points[i];
    }
  }

  static constexpr float ROUNDER = 0x1.8p23f;  // (x + ROUNDER) - ROUNDER rounds to whole numbers, halves to even

  const ScalesTask& task_;
  const int size_;
  const std::unique_ptr<float[]> at_, points_;
};

void search_scales(const ScalesTask& task) {
  const int64_t piece = std::max<int64_t>(1, 4096 / task.size);  // groups
  std::atomic<int64_t> next{0};
  run_workers(task.threads, [&] {
    const ScaleSearch search(task);
    for (int64_t begin; (begin = next.fetch_add(piece)) < task.groups;) {
      for (int64_t g = begin; g < std::min(begin + piece, task.groups); ++g) task.best[g] = search.best(g);
    }
  });
}
