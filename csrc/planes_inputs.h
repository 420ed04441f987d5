// Inputs as the paths want them, a tile of tokens at a time. Included inside a namespace; see planes_product.h.

constexpr int MAX_TOKENS = 32;  // of a tile: with them a group of inputs, tables even, stays in the first-level cache

// Bytes for 32 columns of one token.
constexpr int input_bytes(int path) {
  return path == PALEY_POPCOUNT ? 4 * sizeof(uint32_t) : path == PALEY_DOTS ? 32 : 2 * TABLE_BYTES;
}

struct Inputs {
  int64_t first;  // token of the tile
  int tokens;
  int stride;  // bytes of one token's group
  std::unique_ptr<uint8_t[]> room;
  uint8_t* data;                          // in it, [groups, tokens, stride], aligned to a cache line
  std::unique_ptr<float[]> scales, sums;  // [groups, tokens]; sums of code - zero
  std::unique_ptr<int32_t[]> zeros;       // [groups, tokens]
};

template <int PATH>
Inputs prepare_inputs(const PlanesTask& task, int64_t first, int tokens) {
  const int columns = 32 * task.words, stride = task.words * input_bytes(PATH);
  const int64_t count = int64_t{task.groups} * tokens;
  Inputs in{first, tokens, stride, {}, nullptr, {}, {}, {}};
  in.room.reset(new uint8_t[count * stride + 63]);
  in.data = in.room.get() + (-reinterpret_cast<uintptr_t>(in.room.get()) & 63);
  in.scales.reset(new float[count]);
  in.sums.reset(new float[count]);
  in.zeros.reset(new int32_t[count]);
  for (int64_t g = 0; g < task.groups; ++g) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t from = (first + t) * task.groups + g, to = g * tokens + t;
      const uint8_t* codes = task.codes + from * columns;
      const int zero = task.zeros[from];
      alignas(64) uint8_t centred[32 * MAX_WORDS];  // int8, code - zero
      int sum = 0;
      for (int i = 0; i < columns; ++i) sum += codes[i];
      for (int i = 0; i < columns; ++i) centred[i] = static_cast<uint8_t>(codes[i] - zero);
      in.scales[to] = task.scales[from];
      in.sums[to] = static_cast<float>(sum - zero * columns);
      in.zeros[to] = zero;
      uint8_t* data = in.data + to * stride;
      if (PATH == PALEY_DOTS) std::memcpy(data, centred, columns);
      for (int k = 0; k < task.words; ++k) {
        if (PATH == PALEY_POPCOUNT) {
          for (int bit = 0; bit < 4; ++bit) {
            const uint32_t word = plane_word(codes + 32 * k, bit);
            std::memcpy(data + 4 * (bit * task.words + k), &word, sizeof word);
          }
        }
        if (PATH == PALEY_TABLES) {
          for (int half = 0; half < 2; ++half) {
            make_tables(centred + 32 * k + 16 * half, data + (2 * k + half) * TABLE_BYTES);
          }
        }
      }
    }
  }
  return in;
}
