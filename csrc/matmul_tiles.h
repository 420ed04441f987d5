// The product of inputs with a prepared matrix, once for each instruction set: included inside a namespace after its
// `Lanes`, which say how codes become integers, how these are multiplied and added, and how sums become floats.
//
// One token: codes become integers in registers. More: they are written out once for all tokens, for some panels and
// columns at a time, so that they stay in the cache.

constexpr int VECTORS = Lanes::VECTORS;  // of four bytes for each row of a panel
constexpr int STEPS = BLOCK_DWORDS / 2;  // codes become integers two dwords at a time
constexpr int64_t CHUNK = 32;            // blocks written out at a time
constexpr int64_t PANELS = 4;            // panels likewise
constexpr int64_t TOKENS = 128;          // tokens that share what was written out
constexpr int64_t BLOCK_BYTES = BLOCK_DWORDS * PANEL_ROWS * 4;  // of a block that was written out

using Ints = Lanes::Ints;
using Floats = Lanes::Floats;

template <bool FINE>
PALEY_INLINE Ints dot(Ints sum, Ints weights, const typename Lanes::Values& x) {
  if constexpr (FINE) return Lanes::dot_words(sum, weights, x);
  return Lanes::dot_bytes(sum, weights, x);
}

// The parameters of a group.
template <bool FINE, bool AFFINE>
struct Group {
  const uint8_t* at;

  // sums, less what the inputs' codes add up to times the zero point, as floats.
  PALEY_INLINE Floats centred(Ints sums, int v, int32_t sum) const {
    if constexpr (AFFINE) {
      sums = Lanes::less_zeros(sums, at + 32 + v * Lanes::WIDTH, FINE ? 0 : Lanes::BIAS, sum);
    } else if constexpr (!FINE && Lanes::BIAS != 0) {
      sums = Lanes::less(sums, Lanes::BIAS * sum);
    }
    return Lanes::to_float(sums);
  }
  PALEY_INLINE Floats scales(int v) const { return Lanes::load_halves(at + 2 * v * Lanes::WIDTH); }
};

// One token, one group: y += its part.
template <Kind KIND, bool FINE, bool AFFINE>
PALEY_INLINE void group_of_one(const Lanes::Tables& tables, const uint8_t* at, int32_t columns, int32_t segment,
                               int32_t per, const uint8_t*& x, const float*& steps,
                               const int32_t*& sums, Floats (&y)[VECTORS]) {
  const Group<FINE, AFFINE> group{at};
  const uint8_t* block = at + parameter_bytes(KIND, FINE, AFFINE);
  Floats parts[VECTORS];
  for (auto& part : parts) part = Lanes::zeros();
  for (int32_t from = 0; from < columns; from += segment) {
    const int64_t blocks = blocks_of(std::min(segment, columns - from), per);
    Ints one[VECTORS], other[VECTORS];
    for (int v = 0; v < VECTORS; ++v) one[v] = other[v] = Lanes::none();
    for (int64_t b = 0; b < blocks; ++b, block += block_bytes(KIND, FINE), x += 32) {
      PALEY_UNROLL for (int step = 0; step < STEPS; ++step) {
        const typename Lanes::Values even = Lanes::all(x + 8 * step), odd = Lanes::all(x + 8 * step + 4);
        PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) {
          Ints w0, w1;
          Lanes::template decode<KIND, FINE>(tables, block, step, v, w0, w1);
          one[v] = dot<FINE>(one[v], w0, even);
          if constexpr (Lanes::CHAINS == 2) {
            other[v] = dot<FINE>(other[v], w1, odd);
          } else {
            one[v] = dot<FINE>(one[v], w1, odd);
          }
        }
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      if constexpr (Lanes::CHAINS == 2) one[v] = Lanes::plus(one[v], other[v]);
      parts[v] = Lanes::add(parts[v], Lanes::mul(group.centred(one[v], v, *sums), Lanes::all(*steps)));
    }
    ++sums, ++steps;
  }
  for (int v = 0; v < VECTORS; ++v) y[v] = Lanes::add(y[v], Lanes::mul(parts[v], group.scales(v)));
}

inline void put(const MatmulTask& task, int64_t token, int32_t row, const float* values) {
  const int rows = std::min(PANEL_ROWS, task.row_end - row);
  std::copy_n(values, rows, task.y + token * task.y_row + row);
}

// Where the outliers of a token start in its inputs.
struct Rest {
  const uint8_t* x;
  const float* steps;
  const int32_t* sums;
};

template <bool FINE>
__attribute__((noinline)) void outliers_of_one(const MatmulTask& task, const uint8_t* record, Rest rest, float* y) {
  const int32_t columns = task.matrix.layout.outliers;
  Floats values[VECTORS];
  for (int v = 0; v < VECTORS; ++v) values[v] = Lanes::load(y + v * Lanes::WIDTH);
  const typename Lanes::Tables tables(PALEY_BYTES, nullptr);
  group_of_one<PALEY_BYTES, FINE, false>(tables, record, columns, columns, FINE ? 2 : 4, rest.x, rest.steps, rest.sums,
                                         values);
  for (int v = 0; v < VECTORS; ++v) Lanes::store(y + v * Lanes::WIDTH, values[v]);
}

template <Kind KIND, bool FINE, bool AFFINE>
void one_token(const MatmulTask& task) {
  const Matrix& matrix = task.matrix;
  const InputsLayout& layout = matrix.layout;
  typename Lanes::Tables tables(KIND, matrix.table);
  const int32_t groups = layout.columns / layout.group;
  for (int32_t row = task.row_begin; row < task.row_end; row += PANEL_ROWS) {
    const uint8_t* record = matrix.panels + row / PANEL_ROWS * matrix.panel_bytes;
    Rest rest{task.inputs.codes, task.inputs.steps, task.inputs.sums};
    Floats y[VECTORS];
    for (auto& values : y) values = Lanes::zeros();
    for (int32_t g = 0; g < groups; ++g, record += matrix.group_bytes) {
      if constexpr (KIND == PALEY_OWN2) tables.own(record + 32);
      group_of_one<KIND, FINE, AFFINE>(tables, record, layout.group, layout.segment, layout.per, rest.x, rest.steps,
                                       rest.sums, y);
    }
    float values[PANEL_ROWS];
    for (int v = 0; v < VECTORS; ++v) {
      Lanes::store(values + v * Lanes::WIDTH, Lanes::mul(y[v], Lanes::all(matrix.table_scale)));
    }
    if (layout.outliers) outliers_of_one<FINE>(task, record, rest, values);
    put(task, 0, row, values);
  }
}

// Space for several tokens.
struct Work {
  alignas(64) uint8_t weights[PANELS][CHUNK * BLOCK_BYTES];
  alignas(64) int32_t sums[PANELS][TOKENS][PANEL_ROWS];  // of a segment that goes on
  alignas(64) float parts[PANELS][TOKENS][PANEL_ROWS];   // of a group
  alignas(64) float y[PANELS][TOKENS][PANEL_ROWS];
};

// Blocks of a group that starts at `group`, from number `from` on.
template <Kind KIND, bool FINE>
__attribute__((noinline)) void write_out(Lanes::Tables& tables, bool affine, const uint8_t* group, int64_t from,
                                         int64_t blocks, uint8_t* out) {
  if constexpr (KIND == PALEY_OWN2) tables.own(group + 32);
  const uint8_t* block = group + parameter_bytes(KIND, FINE, affine) + from * block_bytes(KIND, FINE);
  for (int64_t b = 0; b < blocks; ++b, block += block_bytes(KIND, FINE), out += BLOCK_BYTES) {
    PALEY_UNROLL for (int step = 0; step < STEPS; ++step) {
      PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) {
        Ints w0, w1;
        Lanes::template decode<KIND, FINE>(tables, block, step, v, w0, w1);
        Lanes::store(out + (2 * step * VECTORS + v) * (4 * Lanes::WIDTH), w0);
        Lanes::store(out + ((2 * step + 1) * VECTORS + v) * (4 * Lanes::WIDTH), w1);
      }
    }
  }
}

// Where a chunk lies in its group. Blocks count from the group's first.
struct Chunk {
  const uint8_t* group;  // its parameters
  int64_t first, last, blocks_of_group;
  int64_t whole;             // blocks of a segment that is not the last one
  int64_t x, segment;        // of the group: where its inputs start in a row, and its first segment
};

// sums += weights times T tokens, whose codes lie `row` bytes apart.
template <bool FINE, int T>
PALEY_INLINE void multiply(Ints (&sums)[T][VECTORS], const uint8_t* weights, const uint8_t* x, int64_t row,
                           int64_t dwords) {
  for (; dwords; --dwords, x += 4, weights += PANEL_ROWS * 4) {
    Ints w[VECTORS];
    PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) w[v] = Lanes::load(weights + v * 4 * Lanes::WIDTH);
    PALEY_UNROLL_16 for (int t = 0; t < T; ++t) {
      const typename Lanes::Values values = Lanes::all(x + t * row);
      PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) sums[t][v] = dot<FINE>(sums[t][v], w[v], values);
    }
  }
}

// T tokens from `token` on times the written out chunk of a panel.
template <bool FINE, bool AFFINE, int T>
__attribute__((noinline)) void tile(const Inputs& in, const Chunk& chunk, const uint8_t* weights, int64_t token,
                                    int32_t (*kept)[PANEL_ROWS], float (*parts)[PANEL_ROWS], float (*y)[PANEL_ROWS]) {
  const Group<FINE, AFFINE> group{chunk.group};
  const int64_t row = in.layout.row_bytes, segments = in.layout.segments;
  const uint8_t* x = in.codes + token * row + chunk.x + 32 * chunk.first;
  int64_t block = chunk.first, number = block / chunk.whole;
  while (block < chunk.last) {
    const int64_t start = number * chunk.whole, end = std::min(start + chunk.whole, chunk.blocks_of_group);
    const int64_t until = std::min(end, chunk.last);
    Ints sums[T][VECTORS];
    PALEY_UNROLL_16 for (int t = 0; t < T; ++t) {
      PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) {
        sums[t][v] = block == start ? Lanes::none() : Lanes::load(kept[t] + v * Lanes::WIDTH);
      }
    }
    const int64_t dwords = (until - block) * BLOCK_DWORDS;
    multiply<FINE, T>(sums, weights, x, row, dwords);
    x += 4 * dwords, weights += PANEL_ROWS * 4 * dwords;
    block = until;
    if (block < end) {
      PALEY_UNROLL_16 for (int t = 0; t < T; ++t) {
        PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) Lanes::store(kept[t] + v * Lanes::WIDTH, sums[t][v]);
      }
      return;
    }
    const int64_t at = token * segments + chunk.segment + number++;
    PALEY_UNROLL_16 for (int t = 0; t < T; ++t) {
      PALEY_UNROLL for (int v = 0; v < VECTORS; ++v) {
        float* part = parts[t] + v * Lanes::WIDTH;
        const Floats before = start == 0 ? Lanes::zeros() : Lanes::load(part);
        const Floats own = group.centred(sums[t][v], v, in.sums[at + t * segments]);
        const Floats after = Lanes::add(before, Lanes::mul(own, Lanes::all(in.steps[at + t * segments])));
        if (block < chunk.blocks_of_group) {
          Lanes::store(part, after);
        } else {
          float* to = y[t] + v * Lanes::WIDTH;
          Lanes::store(to, Lanes::add(Lanes::load(to), Lanes::mul(after, group.scales(v))));
        }
      }
    }
  }
}

template <bool FINE, bool AFFINE, int T>
PALEY_INLINE int64_t tiles(const Inputs& in, const Chunk& chunk, int64_t first, int64_t t, int64_t tokens, int64_t p,
                           Work& work) {
  for (; t + T <= tokens; t += T) {
    tile<FINE, AFFINE, T>(in, chunk, work.weights[p], first + t, work.sums[p] + t, work.parts[p] + t, work.y[p] + t);
  }
  if constexpr (T > 1) return tiles<FINE, AFFINE, T / 2>(in, chunk, first, t, tokens, p, work);
  return t;
}

using WriteOut = void (*)(Lanes::Tables&, bool, const uint8_t*, int64_t, int64_t, uint8_t*);

// A group of columns in some panels, whose records start at `record`.
template <bool FINE, bool AFFINE>
void group_of_many(const MatmulTask& task, WriteOut write, Lanes::Tables& tables, const uint8_t* record, int64_t panels,
                   Chunk chunk, int64_t first, int64_t tokens, Work& work) {
  const int64_t all = chunk.blocks_of_group;
  for (int64_t from = 0; from < all; from += CHUNK) {
    const int64_t blocks = std::min(CHUNK, all - from);
    for (int64_t p = 0; p < panels; ++p) {
      write(tables, AFFINE, record + p * task.matrix.panel_bytes, from, blocks, work.weights[p]);
    }
    chunk.first = from, chunk.last = from + blocks;
    constexpr int64_t BAND = 4 * Lanes::TOKENS;  // tokens whose codes stay in the cache while panels take turns
    for (int64_t t = 0; t < tokens; t += BAND) {
      for (int64_t p = 0; p < panels; ++p) {
        chunk.group = record + p * task.matrix.panel_bytes;
        tiles<FINE, AFFINE, Lanes::TOKENS>(task.inputs, chunk, first, t, std::min(t + BAND, tokens), p, work);
      }
    }
  }
}

// The tokens from `begin` on.
template <bool FINE, bool AFFINE>
void many_tokens(const MatmulTask& task, WriteOut write, Lanes::Tables& tables, int64_t begin) {
  const Matrix& matrix = task.matrix;
  const InputsLayout& layout = matrix.layout;
  const std::unique_ptr<Work> work(new Work);
  const int32_t groups = layout.columns / layout.group;
  const int64_t blocks = blocks_of_group(layout), whole = blocks_of(layout.segment, layout.per);
  for (int64_t first = begin; first < task.inputs.tokens; first += TOKENS) {
    const int64_t tokens = std::min(TOKENS, task.inputs.tokens - first);
    for (int32_t row = task.row_begin; row < task.row_end; row += PANELS * PANEL_ROWS) {
      const int64_t panels = std::min(PANELS, divided_up(task.row_end - row, PANEL_ROWS));
      const uint8_t* record = matrix.panels + row / PANEL_ROWS * matrix.panel_bytes;
      for (int64_t p = 0; p < panels; ++p) std::memset(work->y[p], 0, tokens * sizeof work->y[p][0]);
      for (int32_t g = 0; g < groups; ++g, record += matrix.group_bytes) {
        const Chunk group{record, 0, 0, blocks, whole, 32 * g * blocks, int64_t{g} * layout.segments_of_group};
        group_of_many<FINE, AFFINE>(task, write, tables, record, panels, group, first, tokens, *work);
      }
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t t = 0; t < tokens; ++t) {
          for (float& value : work->y[p][t]) value *= matrix.table_scale;
        }
      }
      if (layout.outliers) {
        const int64_t own = blocks_of(layout.outliers, FINE ? 2 : 4);
        const Chunk group{record, 0, 0, own, own, 32 * groups * blocks, layout.segments - 1};
        group_of_many<FINE, false>(task, write_out<PALEY_BYTES, FINE>, tables, record, panels, group, first, tokens,
                                   *work);
      }
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t t = 0; t < tokens; ++t) {
          put(task, first + t, row + static_cast<int32_t>(p) * PANEL_ROWS, work->y[p][t]);
        }
      }
    }
  }
}

// Likewise the first `tokens` of them, a multiple of Lanes::WIDE: see matmul_wide.h.
template <bool AFFINE>
void wide_tokens(const MatmulTask& task, WriteOut write, Lanes::Tables& tables, int64_t tokens);
