// Candidate points and boxes of vectors. Included inside a namespace after its lanes, as nearest_search.h.

constexpr float LOWEST = -INFINITY;

PALEY_INLINE uint32_t lanes_below(int size) { return size >= W ? (1u << (W - 1) << 1) - 1 : (1u << size) - 1; }

// Least and greatest of a[0 .. size) and of what follows up to a multiple of W.
inline void range_of(const float* a, int size, float& low, float& high) {
  Floats lows = load(a), highs = lows;
  for (int k = W; k < size; k += W) {
    lows = min(lows, load(a + k));
    highs = max(highs, load(a + k));
  }
  float l[W], h[W];
  store(l, lows);
  store(h, highs);
  low = *std::min_element(l, l + W);
  high = *std::max_element(h, h + W);
}

template <int P>
struct Box {
  float low[P], high[P];
};

// Points in ascending order of their index, an array for each coordinate; W entries of score -inf follow.
template <int P>
struct List {
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> index;
  float* c[P];
  float* bias;  // -|c|^2/2
  int size = 0;
  Box<P> box;
  float most[P], most_bias;  // greatest absolute values

  explicit List(int capacity) : floats(new float[(P + 1) * (capacity + W)]), index(new int32_t[capacity + W]()) {
    for (int i = 0; i < P; ++i) c[i] = floats.get() + i * (capacity + W);
    bias = floats.get() + P * (capacity + W);
  }

  // To be called once c, bias, index and size are set.
  void finish() {
    for (int i = 0; i < P; ++i) {
      std::fill_n(c[i] + size, W, c[i][0]);
      range_of(c[i], size, box.low[i], box.high[i]);
      most[i] = std::max(-box.low[i], box.high[i]);
    }
    float lowest, highest;
    std::fill_n(bias + size, W, bias[0]);
    range_of(bias, size, lowest, highest);
    most_bias = -lowest;
    std::fill_n(bias + size, W, LOWEST);
  }
};

// Keeps of `list` the points that may be nearest to something in the box. The difference of two scores is linear, so
// its least value on a box is that at the centre less sum half_i |c_i - d_i|; d is the point nearest to the centre.
// scores: room for list.size + W.
template <int P>
void prune(const List<P>& list, const Box<P>& box, float* scores, List<P>& kept) {
  float centre[P], half[P], reach = list.most_bias;
  for (int i = 0; i < P; ++i) {
    centre[i] = 0.5f * box.low[i] + 0.5f * box.high[i];
    half[i] = std::max(box.high[i] - centre[i], centre[i] - box.low[i]) * (1 + 4 * FLT_EPSILON) + FLT_MIN;
    reach += (std::fabs(centre[i]) + 2 * half[i]) * list.most[i];
  }
  const Floats margin = all((4 * P + 8) * (FLT_EPSILON * reach + FLT_MIN));  // twice the bound of all roundings
  Floats best = all(LOWEST);
  for (int j = 0; j < list.size; j += W) {
    Floats score = load(list.bias + j);
    for (int i = 0; i < P; ++i) score = fma(all(centre[i]), load(list.c[i] + j), score);
    store(scores + j, score);
    best = max(best, score);
  }
  float bests[W];
  store(bests, best);
  const float top = *std::max_element(bests, bests + W);
  int d = 0;
  while (d + W < list.size && bits(greater(all(top), load(scores + d))) == lanes_below(W)) d += W;
  while (d < list.size - 1 && top > scores[d]) ++d;

  kept.size = 0;
  for (int j = 0; j < list.size; j += W) {
    Floats lead = sub(all(top), load(scores + j));
    for (int i = 0; i < P; ++i) {
      lead = fma(all(-half[i]), abs(sub(load(list.c[i] + j), all(list.c[i][d]))), lead);
    }
    const uint32_t may_win = ~bits(greater(lead, margin)) & lanes_below(list.size - j);
    if (!may_win) continue;
    for (int i = 0; i < P; ++i) keep(kept.c[i] + kept.size, load(list.c[i] + j), may_win);
    keep(kept.bias + kept.size, load(list.bias + j), may_win);
    kept.size += keep(kept.index.get() + kept.size, load(list.index.get() + j), may_win);
  }
  kept.finish();
}
