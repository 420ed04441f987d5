// Blocks of a product. Included within the namespace of a level, whose `Lanes` says how values are held and added.
//
// Every level sums in one order: runs of RUN values of k, each from 0 by pairs, the odd value first, and then added to
// c. The product of two bfloat16 is exact in float32: it does not matter whether multiply and add are fused.

constexpr int64_t RUN = 512, SPAN = 4 * RUN;  // SPAN: what is held packed
constexpr int64_t GROUP = 16;  // panels of a that a job multiplies by one panel of b
constexpr int64_t TALL = Lanes::TALL, VECTORS = Lanes::VECTORS, WIDE = VECTORS * Lanes::COUNT;
constexpr int64_t WORDS = Lanes::WORDS;  // of a pair: the odd value and the even one, or one word with both
using Tile = Lanes::Vector[TALL][VECTORS];

// The bits of x rounded to bfloat16, ties to even; denormal numbers become 0, as in the instructions.
PALEY_INLINE uint32_t rounded(uint32_t x) {
  const uint32_t size = x & 0x7fffffffu;
  const uint32_t even = (x + 0x7fffu + ((x >> 16) & 1)) & 0xffff0000u;
  const uint32_t number = size > 0x7f800000u ? (x | 0x00400000u) & 0xffff0000u : even;
  return size < 0x00800000u ? x & 0x80000000u : number;
}

PALEY_INLINE uint32_t rounded(const float* x) {
  uint32_t word;
  std::memcpy(&word, x, sizeof word);
  return rounded(word);
}

PALEY_INLINE void set(uint32_t* out, int64_t panel, uint32_t even, uint32_t odd) {
  out[0] = WORDS == 1 ? odd | even >> 16 : odd;
  if (WORDS == 2) out[panel] = even;
}

// `run` columns of a panel's rows -> [pairs, WORDS, panel]; what is missing is 0.
inline void pack(const ProductsTask::Matrix& x, int64_t rows, int64_t run, int64_t panel, uint32_t* out) {
  const int64_t pairs = (run + 1) / 2, step = WORDS * panel;
  uint32_t even[RUN] = {}, odd[RUN] = {};
  if (x.column != 1) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const float* one = x.start + 2 * pair * x.column;
      const float* other = 2 * pair + 1 < run ? one + x.column : nullptr;
      for (int64_t r = 0; r < rows; ++r) even[r] = rounded(one + r * x.row);
      for (int64_t r = 0; r < rows; ++r) odd[r] = other ? rounded(other + r * x.row) : 0;
      for (int64_t r = 0; r < panel; ++r) set(out + pair * step + r, panel, even[r], odd[r]);
    }
    return;
  }
  for (int64_t r = 0; r < panel; ++r) {
    if (r < rows) {
      const float* row = x.start + r * x.row;
      for (int64_t pair = 0; pair < run / 2; ++pair) {
        even[pair] = rounded(row + 2 * pair);
        odd[pair] = rounded(row + 2 * pair + 1);
      }
      if (run % 2) even[pairs - 1] = rounded(row + run - 1), odd[pairs - 1] = 0;
    } else if (r == rows) {
      std::fill_n(even, pairs, 0), std::fill_n(odd, pairs, 0);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) set(out + pair * step + r, panel, even[pair], odd[pair]);
  }
}

PALEY_INLINE void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, Tile& result) {
  Tile sums;  // its own, so that it stays in registers
  for (auto& row : sums)
    for (auto& sum : row) sum = Lanes::zero();
  for (int64_t word = 0; word < pairs * WORDS; ++word, a += TALL, b += WIDE) {
    typename Lanes::Words right[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) right[v] = Lanes::load(b + v * Lanes::COUNT);
    for (int64_t i = 0; i < TALL; ++i) {
      const auto left = Lanes::all(a[i]);
      for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] = Lanes::add(sums[i][v], left, right[v]);
    }
  }
  std::memcpy(&result, &sums, sizeof sums);
}

inline void put(const ProductsTask& task, int64_t row, int64_t column, bool add, const Tile& sums) {
  const int64_t rows = std::min(TALL, task.m - row), columns = std::min(WIDE, task.n - column);
  for (int64_t i = 0; i < rows; ++i) {
    float values[WIDE];
    for (int64_t v = 0; v < VECTORS; ++v) Lanes::store(values + v * Lanes::COUNT, sums[i][v]);
    float* c = task.c + (row + i) * task.n + column;
    for (int64_t j = 0; j < columns; ++j) c[j] = add ? c[j] + values[j] : values[j];
  }
}

// Columns from.. of k, SPAN of them at most: first all panels are packed, then all tiles multiplied.
inline void span(const ProductsTask& task, int64_t from, int64_t size, uint32_t* a, uint32_t* b) {
  const int64_t tall = (task.m + TALL - 1) / TALL, wide = (task.n + WIDE - 1) / WIDE;
  const int64_t groups = (tall + GROUP - 1) / GROUP, words = (size + 1) / 2 * WORDS;
  std::atomic<int64_t> next{0};
  run_workers(task.threads, [&] {
    for (int64_t job; (job = next++) < tall + wide;) {
      const bool left = job < tall;
      const auto& x = left ? task.a : task.b;
      const int64_t panel = left ? TALL : WIDE, first = (left ? job : job - tall) * panel;
      const int64_t rows = std::min(panel, (left ? task.m : task.n) - first);
      for (int64_t at = 0; at < size; at += RUN) {
        const float* start = x.start + first * x.row + (from + at) * x.column;
        uint32_t* out = (left ? a : b) + first * words + at / 2 * WORDS * panel;
        pack({start, x.row, x.column}, rows, std::min(RUN, size - at), panel, out);
      }
    }
  });
  next = 0;
  run_workers(task.threads, [&] {
    Tile sums;
    for (int64_t job; (job = next++) < wide * groups;) {
      const int64_t column = job / groups * WIDE, first = job % groups * GROUP;
      for (int64_t at = 0; at < size; at += RUN) {
        const int64_t pairs = (std::min(RUN, size - at) + 1) / 2, skipped = at / 2 * WORDS;
        for (int64_t i = first; i < std::min(first + GROUP, tall); ++i) {
          if (task.upper && i * TALL >= column + WIDE) break;
          multiply(a + i * TALL * words + skipped * TALL, b + column * words + skipped * WIDE, pairs, sums);
          put(task, i * TALL, column, task.add || from + at > 0, sums);
        }
      }
    }
  });
}

void products(const ProductsTask& task) {
  const int64_t tall = (task.m + TALL - 1) / TALL, wide = (task.n + WIDE - 1) / WIDE;
  const int64_t words = (std::min(SPAN, task.k) + 1) / 2 * WORDS;
  const std::unique_ptr<uint32_t[]> a(new uint32_t[tall * TALL * words]), b(new uint32_t[wide * WIDE * words]);
  for (int64_t from = 0; from < task.k; from += SPAN) span(task, from, std::min(SPAN, task.k - from), a.get(), b.get());
}
