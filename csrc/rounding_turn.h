// The Hadamard transform of a token's values, in blocks. Included inside a namespace after its lanes.
//
// Values are first rounded to multiples of one step, so coarse that all their sums are exact in float64: the order in
// which they are added does not matter. See `transform` in src/paley/core/hadamard.py, which has the same meaning.

constexpr int WD = W / 2;  // doubles in a vector

// Room of this thread for so many values, the same each time: a decoded token is rounded in many small calls, and
// memory of its own for each would take as long. PURPOSE tells the rooms of one type apart.
template <class Value, int PURPOSE>
Value* room(int64_t count) {
  thread_local std::vector<Value> kept;
  if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
  return kept.data();
}

// A Hadamard transform of one width; one at a time on a thread.
class Turn {
 public:
  explicit Turn(const paley_rounding& how)
      : wide_(how.out_dim),
        order_(how.order),
        m_(how.m),
        stride_((how.m + 7) / 8 * 8),
        scale_(1 / std::sqrt(static_cast<double>(how.order))),
        dense_(how.dense),
        from_(room<double, 0>(wide_)),
        to_(room<double, 1>(wide_)) {}

  // x [wide], in place.
  void apply(float* x) const {
    for (int block = 0; block < wide_; block += order_) on_steps(x + block, from_ + block);
    const int rows = wide_ / m_;
    int row = 0;
    for (; row + 4 <= rows; row += 4) multiply<4>(row);
    for (; row < rows; ++row) multiply<1>(row);
    for (int block = 0; block < wide_; block += order_) sylvester(to_ + block);
    const double* y = to_;
    for (int i = 0; i < wide_; ++i) x[i] = static_cast<float>(y[i] * scale_);
  }

 private:
  void on_steps(const float* x, double* y) const {
    float largest = 0;
    int i = 0;
    if (order_ >= W) {
      Floats top = all(0.0f);
      for (; i + W <= order_; i += W) top = max(top, abs(load(x + i)));
      largest = greatest(top);
    }
    for (; i < order_; ++i) largest = std::max(largest, std::fabs(x[i]));
    const double far = static_cast<double>(largest) * (3.0 * order_);
    for (i = 0; i < order_; ++i) y[i] = (x[i] + far) - far;
  }

  // The rows [first, first + R) of [wide / m, m] times the dense matrix.
  template <int R>
  void multiply(int first) const {
    const double* x = from_ + int64_t{first} * m_;
    double* y = to_ + int64_t{first} * m_;
    for (int i = 0; i < m_; i += 2 * WD) {
      if (i + WD < m_) {
        columns<R, 2>(x, y, i);
      } else {
        columns<R, 1>(x, y, i);
      }
    }
  }

  // V vectors of columns, from i on.
  template <int R, int V>
  PALEY_INLINE void columns(const double* x, double* y, int i) const {
    Doubles sums[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = all(0.0);
    }
    const double* h = dense_ + i;
    for (int j = 0; j < m_; ++j, h += stride_) {
      Doubles signs[V];
      for (int v = 0; v < V; ++v) signs[v] = load(h + v * WD);
      for (int r = 0; r < R; ++r) {
        const Doubles value = all(x[int64_t{r} * m_ + j]);
        for (int v = 0; v < V; ++v) sums[r][v] = fma(value, signs[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        const int start = i + v * WD;
        double* to = y + int64_t{r} * m_ + start;
        if (start + WD <= m_) {
          store(to, sums[r][v]);
        } else {
          double lanes[WD];
          store(lanes, sums[r][v]);
          std::copy(lanes, lanes + (m_ - start), to);
        }
      }
    }
  }

  void sylvester(double* y) const {
    int step = m_;
    for (; 8 * step <= order_; step *= 8) steps<8>(y, step);
    if (4 * step == order_) steps<4>(y, step);
    if (2 * step == order_) steps<2>(y, step);
  }

  // Multiplies the values at distances 0, step, ..., (N - 1) step by a Sylvester matrix.
  template <int N>
  void steps(double* y, int step) const {
    for (int base = 0; base < order_; base += N * step) {
      double* at = y + base;
      int i = 0;
      for (; i + WD <= step; i += WD) {
        Doubles a[N];
        for (int k = 0; k < N; ++k) a[k] = load(at + k * step + i);
        butterflies<N>(a);
        for (int k = 0; k < N; ++k) store(at + k * step + i, a[k]);
      }
      for (; i < step; ++i) {
        double a[N];
        for (int k = 0; k < N; ++k) a[k] = at[k * step + i];
        butterflies<N>(a);
        for (int k = 0; k < N; ++k) at[k * step + i] = a[k];
      }
    }
  }

  template <int N, class Value>
  static PALEY_INLINE void butterflies(Value* a) {
    for (int half = 1; half < N; half *= 2) {
      for (int k = 0; k < N; ++k) {
        if (k & half) continue;
        const Value sum = a[k] + a[k + half];
        a[k + half] = a[k] - a[k + half];
        a[k] = sum;
      }
    }
  }

  const int wide_, order_, m_, stride_;
  const double scale_;
  const double* const dense_;
  double *const from_, *const to_;
};
