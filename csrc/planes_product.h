// y = X W^T from integer sums, once for each instruction set: included inside a namespace after its lanes and kernels.
//
// With the bits s and q of a weight's code, its value is c0 + dS s + dQ q + dR s q. Over a group of columns a row's
// product with the inputs x - zero is c0 sum(x - zero) + dS S + dQ Q + dR R, where S, Q and R are the sums of x - zero
// over the columns with s, with q, with both. The paths compute these three, exactly, each in its own way; what
// follows is one formula in float32, fused in one order: paths, instruction sets and threads change no bit of y.

// Bytes of weights to ask for in advance: 20% faster with 4 tokens. For one token the hardware prefetcher is better.
constexpr int64_t AHEAD = 2048;

// T tokens, one block of rows, one group. y: [T, PANEL]. A function of its own, or registers run out.
template <int PATH, int MAPS, int T>
__attribute__((noinline)) void tile(const PlanesTask& task, const Inputs& in, const uint8_t* record, const Work& work,
                                    int64_t g, int64_t t, float* y) {
  Rows sums[T][MAPS];
  const int64_t at = g * in.tokens + t;
  if constexpr (PATH == PALEY_POPCOUNT) {
    popcount_sums<MAPS, T>(record, task.words, in.data + at * in.stride, in.stride, &in.zeros[at], work, sums);
  } else if constexpr (PATH == PALEY_DOTS) {
    dot_sums<MAPS, T>(record, task.words, in.data + at * in.stride, in.stride, work, sums);
  } else {
    table_sums<MAPS, T>(record, task.words, in.data + at * in.stride, in.stride, work, sums);
  }
  const uint8_t* centroids = record + task.words * WORD_BYTES;
  PALEY_UNROLL for (int part = 0; part < BLOCK / W; ++part) {
    Floats c[4];
    PALEY_UNROLL for (int k = 0; k < 4; ++k) c[k] = load_half(centroids + (k * BLOCK + part * W) * sizeof(uint16_t));
    const Floats dQ = sub(c[1], c[0]), dS = sub(c[2], c[0]), dR = sub(sub(c[3], c[2]), dQ);
    PALEY_UNROLL for (int i = 0; i < T; ++i) {
      Floats v = mul(c[0], all(in.sums[at + i]));
      if constexpr (MAPS == 3) v = fused(dR, to_float(sums[i][2].part[part]), v);
      v = fused(dQ, to_float(sums[i][1].part[part]), v);
      v = fused(dS, to_float(sums[i][0].part[part]), v);
      float* to = y + i * PANEL + part * W;
      store(to, fused(all(in.scales[at + i]), v, load(to)));
    }
  }
}

// As many tokens at a time as the registers hold, then half as many, ...
template <int PATH, int MAPS, int T>
PALEY_INLINE int64_t tiles(const PlanesTask& task, const Inputs& in, const uint8_t* record, const Work& work,
                           int64_t g, int64_t t, float* y) {
  for (; t + T <= in.tokens; t += T) tile<PATH, MAPS, T>(task, in, record, work, g, t, y + t * PANEL);
  if constexpr (T > 1) return tiles<PATH, MAPS, T / 2>(task, in, record, work, g, t, y);
  return t;
}

template <int PATH, int MAPS>
void panel_product(const PlanesTask& task, const Inputs& in, int64_t row, Work& work, float* y) {
  const int blocks = blocks_from(row, task.out);
  const int64_t bytes = record_bytes(task.words);
  const uint8_t* record = task.blob + row / BLOCK * task.groups * bytes;
  std::fill_n(y, in.tokens * PANEL, 0.0f);
  for (int64_t g = 0; g < task.groups; ++g) {
    for (int b = 0; b < blocks; ++b, record += bytes) {
      if (in.tokens > 1) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(record + AHEAD + i);
      }
      prepare_weights<PATH, MAPS>(record, task.words, in.tokens, work);
      tiles<PATH, MAPS, tokens_at_once(PATH)>(task, in, record, work, g, 0, y + b * BLOCK);
    }
  }
  const int64_t rows = std::min<int64_t>(PANEL, task.out - row);
  for (int64_t t = 0; t < in.tokens; ++t) std::copy_n(y + t * PANEL, rows, task.y + (in.first + t) * task.out + row);
}

template <int PATH, int MAPS>
void product(const PlanesTask& task) {
  for (int64_t first = 0; first < task.tokens; first += MAX_TOKENS) {
    const int tokens = static_cast<int>(std::min<int64_t>(MAX_TOKENS, task.tokens - first));
    const Inputs in = prepare_inputs<PATH>(task, first, tokens);
    std::atomic<int64_t> next{0};
    run_workers(task.threads, [&] {
      alignas(64) float y[MAX_TOKENS * PANEL];
      alignas(64) Work work;
      for (int64_t row; (row = next.fetch_add(PANEL)) < task.out;) panel_product<PATH, MAPS>(task, in, row, work, y);
    });
  }
}

template <int PATH>
void product(const PlanesTask& task) {
  task.mirrored ? product<PATH, 2>(task) : product<PATH, 3>(task);
}
