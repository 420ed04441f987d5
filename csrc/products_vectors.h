// Panels for the levels that have no tiles; included before products_tiles.h. Their `Vectors` says how values are held
// and added.

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

struct Lanes {
  static constexpr int64_t TALL = Vectors::TALL, WIDE = Vectors::COUNT * Vectors::VECTORS, WORDS = Vectors::WORDS;
  static constexpr int64_t STEP = 1;
  struct Session {};

  static PALEY_INLINE void set(uint32_t* out, int64_t panel, uint32_t even, uint32_t odd) {
    out[0] = WORDS == 1 ? odd | even >> 16 : odd;
    if (WORDS == 2) out[panel] = even;
  }

  // `run` columns of a panel's rows -> [pairs, WORDS, panel]; what is missing is 0.
  template <bool LEFT>
  static void pack(const ProductsTask::Matrix& x, int64_t rows, int64_t run, uint32_t* out) {
    constexpr int64_t panel = LEFT ? TALL : WIDE, step = WORDS * panel;
    const int64_t pairs = (run + 1) / 2;
    uint32_t even[PRODUCTS_RUN] = {}, odd[PRODUCTS_RUN] = {};
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

  // a [pairs, WORDS, TALL], b [pairs, WORDS, WIDE] -> result [TALL, WIDE].
  static PALEY_INLINE void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* result) {
    typename Vectors::Vector sums[TALL][Vectors::VECTORS];
    for (auto& row : sums)
      for (auto& sum : row) sum = Vectors::zero();
    for (int64_t word = 0; word < pairs * WORDS; ++word, a += TALL, b += WIDE) {
      typename Vectors::Words right[Vectors::VECTORS];
      for (int64_t v = 0; v < Vectors::VECTORS; ++v) right[v] = Vectors::load(b + v * Vectors::COUNT);
      for (int64_t i = 0; i < TALL; ++i) {
        const auto left = Vectors::all(a[i]);
        for (int64_t v = 0; v < Vectors::VECTORS; ++v) sums[i][v] = Vectors::add(sums[i][v], left, right[v]);
      }
    }
    for (const auto& row : sums)
      for (const auto& sum : row) Vectors::store(result, sum), result += Vectors::COUNT;
  }
};
