// Rounds the values of a token, a group after the other, once for each instruction set: included inside a namespace
// after its lanes, mean.h and rounding_turn.h.
//
// Each float32 operation is rounded by itself, in the order of the torch code (src/paley/core/rounding.py): the results
// are the same to the bit on every level.

constexpr float ROUNDER = 0x1.8p23f;  // (x + ROUNDER) - ROUNDER rounds to whole numbers, halves to even: 0 <= x < 2^22

// x > 0, float32 -> the nearest float16, which must not overflow; NaN stays.
PALEY_INLINE float to_half(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Next to 1.5 * 2^(e + 13) floats are as far apart as halves next to 2^e.
  const int32_t rounder_bits = ((std::max(bits >> 23, 127 - 14) + 13) << 23) | 1 << 22;
  float rounder;
  std::memcpy(&rounder, &rounder_bits, sizeof rounder);
  return x == x ? (x + rounder) - rounder : x;
}

// Least and greatest of x [size], and whether one is NaN.
struct Range {
  float low, high;
  bool nan;

  Range(const float* x, int size) : low(x[0]), high(x[0]), nan(false) {
    int i = 0;
    if (size >= W) {
      Floats lows = load(x), highs = lows;
      uint32_t nans = 0;
      for (; i + W <= size; i += W) {
        const Floats a = load(x + i);
        lows = min(lows, a);
        highs = max(highs, a);
        nans |= bits(is_nan(a));
      }
      low = -greatest(sub(all(0.0f), lows));
      high = greatest(highs);
      nan = nans != 0;
    }
    for (; i < size; ++i) {
      low = std::min(low, x[i]);
      high = std::max(high, x[i]);
      nan |= x[i] != x[i];
    }
  }
};

// One at a time on a thread.
class TokenRounder {
 public:
  explicit TokenRounder(const RoundingTask& task)
      : task_(task),
        how_(task.how),
        size_(task.how.table ? task.how.group_size : 0),
        row_(room<float, 0>(how_.out_dim)),
        work_(room<float, 1>(size_)),
        other_(room<float, 2>(size_)),
        index_(room<int32_t, 0>(size_ + W)) {
    if (how_.dense) turn_.emplace(how_);
    if (!how_.table || how_.table->step > 0) return;
    const paley_table& table = *how_.table;
    while (last_ + 1 < table.n) last_ = 2 * last_ + 1;
    const int edges = std::max(last_, 16), points = std::max(last_ + 1, 16);
    edges_ = room<float, 3>(edges);
    points_ = room<float, 4>(points);
    std::fill(std::copy(table.edges, table.edges + table.n - 1, edges_), edges_ + edges, INFINITY);
    std::fill(std::copy(table.points, table.points + table.n, points_), points_ + points, 0.0f);
  }

  void round(int64_t token) const {
    if (how_.back) return turn_back(token);
    const int wide = how_.out_dim;
    float* row = how_.table ? row_ : task_.values + token * wide;
    read(task_.x + token * how_.in_dim, row);
    if (turn_) turn_->apply(row);
    if (!how_.table) return;
    const int groups = wide / size_;
    for (int g = 0; g < groups; ++g) {
      const int64_t at = token * groups + g;
      const float* x = row + g * size_;
      const Scale scale = scale_of(x);
      if (task_.values) {
        float* points = task_.values + at * size_;
        if (how_.table->step > 0) {
          even<false>(x, scale, points);
        } else {
          search(x, scale);
          look_up(points);
        }
        finish(x, scale, points);
      } else {
        uint8_t* codes = task_.codes + at * size_;
        if (how_.table->step > 0) {
          even<true>(x, scale, codes);
        } else {
          search(x, scale);
          for (int i = 0; i < size_; ++i) codes[i] = static_cast<uint8_t>(index_[i]);
        }
        task_.scales[at] = scale.scale;
        if (how_.affine) task_.zeros[at] = scale.zero == scale.zero ? static_cast<uint8_t>(scale.zero) : 0;
      }
    }
  }

 private:
  struct Scale {
    float scale, zero;
  };

  // x [in_dim] -> row [out_dim]: divided by the diagonal, zeros appended, signs changed.
  void read(const float* x, float* row) const {
    const int narrow = how_.in_dim;
    const float *by = task_.diagonal, *signs = how_.signs;
    if (by) {
      for (int i = 0; i < narrow; ++i) row[i] = x[i] / by[i];
    } else {
      std::copy(x, x + narrow, row);
    }
    std::fill(row + narrow, row + how_.out_dim, 0.0f);
    if (signs) {
      for (int i = 0; i < narrow; ++i) row[i] *= signs[i];
    }
  }

  void turn_back(int64_t token) const {
    float* row = row_;
    const float* x = task_.x + token * how_.out_dim;
    float* values = task_.values + token * how_.in_dim;
    std::copy(x, x + how_.out_dim, row);
    turn_->apply(row);
    for (int i = 0; i < how_.in_dim; ++i) values[i] = how_.signs ? row[i] * how_.signs[i] : row[i];
  }

  Scale scale_of(const float* x) const {
    float scale, low = 0;
    if (how_.by_rms) {
      float* squares = work_;
      for (int i = 0; i < size_; ++i) squares[i] = x[i] * x[i];
      scale = std::sqrt(mean_of(squares, size_)) * how_.factor;
    } else {
      const Range range(x, size_);
      low = std::min(range.low, 0.0f) * how_.factor;
      const float high = std::max(range.high, 0.0f) * how_.factor;
      scale = how_.affine ? (high - low) / how_.peak : std::max(range.high, -range.low) * how_.factor;
      if (range.nan) scale = NAN;
    }
    const float smallest = how_.half ? 0x1p-24f : FLT_MIN, largest = how_.half ? 65504.0f : FLT_MAX;
    scale = scale < smallest ? smallest : scale;
    scale = scale > largest ? largest : scale;
    if (how_.half) scale = to_half(scale);
    return {scale, how_.affine ? clamped(std::nearbyint(-low / scale), how_.peak) : 0.0f};
  }

  // NaN stays, as in the torch code.
  static float clamped(float x, float most) {
    x = x < 0.0f ? 0.0f : x;
    return x > most ? most : x;
  }

  // x [size] -> points of a table of one step, or their codes.
  template <bool CODES, class To>
  void even(const float* x, Scale scale, To* to) const {
    return how_.table->step == 1.0f ? even<CODES, true>(x, scale, to) : even<CODES, false>(x, scale, to);
  }

  template <bool CODES, bool WHOLE, class To>
  void even(const float* x, Scale scale, To* to) const {
    const float first = how_.table->first, step = how_.table->step, last = static_cast<float>(how_.table->n - 1);
    const float zero = scale.zero;
    for (int i = 0; i < size_; ++i) {
      float y = x[i] / scale.scale;
      if (how_.affine) y += zero;
      y = WHOLE ? y - first : (y - first) / step;
      y = y > 0.0f ? y : 0.0f;  // NaN too; the scale keeps it
      y = y < last ? y : last;
      y = (y + ROUNDER) - ROUNDER;
      to[i] = CODES ? static_cast<To>(static_cast<int32_t>(y)) : static_cast<To>(y * step + first);
    }
  }

  // x [size] -> index_ [size]: the number of edges below each value.
  void search(const float* x, Scale scale) const {
    float* y = work_;
    for (int i = 0; i < size_; ++i) {
      y[i] = x[i] / scale.scale;
      if (how_.affine) y[i] += scale.zero;
    }
    int i = 0;
    for (; i + W <= size_; i += W) store(index_ + i, last_ < 16 ? below<true>(load(y + i)) : below<false>(load(y + i)));
    for (; i < size_; ++i) {
      int32_t at = 0;
      for (int32_t jump = (last_ + 1) / 2; jump; jump /= 2) at += y[i] > edges_[at + jump - 1] ? jump : 0;
      index_[i] = at;
    }
  }

  template <bool FEW>
  PALEY_INLINE Ints below(Floats y) const {
    Ints at = all(0);
    for (int32_t jump = (last_ + 1) / 2; jump; jump /= 2) {
      const Ints middle = add(at, all(jump - 1));
      const Floats edge = FEW ? pick_of_16(edges_, middle) : pick(edges_, middle);
      at = select(greater(y, edge), add(at, all(jump)), at);
    }
    return at;
  }

  // index_ [size] -> points.
  void look_up(float* points) const {
    int i = 0;
    for (; i + W <= size_; i += W) {
      const Ints at = load(index_ + i);
      store(points + i, last_ < 16 ? pick_of_16(points_, at) : pick(points_, at));
    }
    for (; i < size_; ++i) points[i] = points_[index_[i]];
  }

  // points [size] -> the values they stand for.
  void finish(const float* x, Scale scale, float* points) const {
    if (how_.refit) return refit(x, points);
    if (how_.affine) {
      for (int i = 0; i < size_; ++i) points[i] = (points[i] - scale.zero) * scale.scale;
    } else {
      for (int i = 0; i < size_; ++i) points[i] *= scale.scale;
    }
  }

  // points [size] -> the line through them that is nearest to x.
  void refit(const float* x, float* points) const {
    float *a = work_, *b = other_;
    std::copy(x, x + size_, a);
    const float middle = mean_of(a, size_);
    std::copy(points, points + size_, a);
    const float of_points = mean_of(a, size_);
    for (int i = 0; i < size_; ++i) {
      points[i] -= of_points;
      a[i] = points[i] * (x[i] - middle);
      b[i] = points[i] * points[i];
    }
    const float along = mean_of(a, size_), square = mean_of(b, size_);
    const float slope = along / (square < 1e-30f ? 1e-30f : square);
    for (int i = 0; i < size_; ++i) points[i] = points[i] * slope + middle;
  }

  const RoundingTask& task_;
  const paley_rounding& how_;
  const int size_;    // values of a group
  int32_t last_ = 1;  // edges, filled up with infinities to 2^b - 1
  std::optional<Turn> turn_;
  float *const row_, *const work_, *const other_;
  float *edges_ = nullptr, *points_ = nullptr;
  int32_t* const index_;
};

void round(const RoundingTask& task) {
  constexpr int64_t PIECE = 16;  // tokens
  std::atomic<int64_t> next{0};
  run_workers(task.threads, [&] {
    if (next.load() >= task.tokens) return;
    const TokenRounder rounder(task);
    for (int64_t begin; (begin = next.fetch_add(PIECE)) < task.tokens;) {
      for (int64_t t = begin; t < std::min(begin + PIECE, task.tokens); ++t) rounder.round(t);
    }
  });
}
