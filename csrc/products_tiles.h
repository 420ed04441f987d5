// Blocks of a product. Included within the namespace of a level: its `Lanes` has the sizes of a block, packs a panel of
// rows, and multiplies two panels.
//
// Every level sums runs of RUN values of k, each from 0, and adds them to c. Vectors sum a run by pairs, the odd value
// first. Tiles take 16 pairs at a time: their even and their odd values are summed apart, each from 0, and then added.
// The product of two bfloat16 is exact in float32: it does not matter whether multiply and add are fused.

constexpr int64_t RUN = PRODUCTS_RUN, SPAN = 4 * RUN;  // SPAN: what is held packed
constexpr int64_t GROUP = 16;  // panels of a that a job multiplies by one panel of b
constexpr int64_t TALL = Lanes::TALL, WIDE = Lanes::WIDE;
constexpr int64_t WORDS = Lanes::WORDS;  // of a pair: the odd value and the even one, or one word with both
constexpr int64_t STEP = Lanes::STEP;    // pairs that are multiplied at once: 1, or 16 in tiles

// Pairs of `size` columns; what is missing to whole steps is 0.
PALEY_INLINE int64_t padded_pairs(int64_t size) { return ((size + 1) / 2 + STEP - 1) / STEP * STEP; }

inline void put(const ProductsTask& task, int64_t row, int64_t column, bool add, const float* sums) {
  const int64_t rows = std::min(TALL, task.m - row), columns = std::min(WIDE, task.n - column);
  for (int64_t i = 0; i < rows; ++i, sums += WIDE) {
    float* c = task.c + (row + i) * task.n + column;
    for (int64_t j = 0; j < columns; ++j) c[j] = add ? c[j] + sums[j] : sums[j];
  }
}

// Columns from.. of k, SPAN of them at most: first all panels are packed, then all tiles multiplied.
inline void span(const ProductsTask& task, int64_t from, int64_t size, uint32_t* a, uint32_t* b) {
  const int64_t tall = (task.m + TALL - 1) / TALL, wide = (task.n + WIDE - 1) / WIDE;
  const int64_t groups = (tall + GROUP - 1) / GROUP, words = padded_pairs(size) * WORDS;
  std::atomic<int64_t> next{0};
  run_workers(task.threads, [&] {
    for (int64_t job; (job = next++) < tall + wide;) {
      const bool left = job < tall;
      const auto& x = left ? task.a : task.b;
      const int64_t panel = left ? TALL : WIDE, first = (left ? job : job - tall) * panel;
      const int64_t rows = std::min(panel, (left ? task.m : task.n) - first);
      for (int64_t at = 0; at < size; at += RUN) {
        const float* start = x.start + first * x.row + (from + at) * x.column;
        const ProductsTask::Matrix part{start, x.row, x.column};
        uint32_t* out = (left ? a : b) + first * words + at / 2 * WORDS * panel;
        if (left) Lanes::pack<true>(part, rows, std::min(RUN, size - at), out);
        else Lanes::pack<false>(part, rows, std::min(RUN, size - at), out);
      }
    }
  });
  next = 0;
  run_workers(task.threads, [&] {
    [[maybe_unused]] const Lanes::Session session;
    alignas(64) float sums[TALL * WIDE];
    for (int64_t job; (job = next++) < wide * groups;) {
      const int64_t column = job / groups * WIDE, first = job % groups * GROUP;
      for (int64_t at = 0; at < size; at += RUN) {
        const int64_t pairs = padded_pairs(std::min(RUN, size - at)), skipped = at / 2 * WORDS;
        for (int64_t i = first; i < std::min(first + GROUP, tall); ++i) {
          if (task.upper && i * TALL >= column + WIDE) break;
          Lanes::multiply(a + i * TALL * words + skipped * TALL, b + column * words + skipped * WIDE, pairs, sums);
          put(task, i * TALL, column, task.add || from + at > 0, sums);
        }
      }
    }
  });
}

void products(const ProductsTask& task) {
  const int64_t tall = (task.m + TALL - 1) / TALL, wide = (task.n + WIDE - 1) / WIDE;
  const int64_t words = padded_pairs(std::min(SPAN, task.k)) * WORDS;
  const std::unique_ptr<uint32_t[]> a(new uint32_t[tall * TALL * words]), b(new uint32_t[wide * WIDE * words]);
  for (int64_t from = 0; from < task.k; from += SPAN) span(task, from, std::min(SPAN, task.k - from), a.get(), b.get());
}
