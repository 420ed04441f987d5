// The product of many tokens by a machine that multiplies tiles: Lanes::WIDE tokens by a panel. Included inside a
// namespace after matmul_tiles.h. All columns of some panels are written out, and two by two tiles at a time run
// through them; floats are added in the order of matmul_tiles.h.

constexpr int64_t WIDE_BYTES = 768 << 10;  // of weights written out at a time, at most, unless two panels have more

// How a segment lies in what was written out of a panel: in whole tiles, the last one filled up with zeros.
constexpr int64_t tiles_of(int64_t blocks) { return divided_up(blocks, 2); }

// Panels of a matrix, written out.
struct Written {
  const MatmulTask& task;
  int32_t row;            // of the first one
  int64_t panels, bytes;  // of a panel
  const uint8_t* records;
  std::unique_ptr<uint8_t[]> space;
  uint8_t* weights;  // in `space`, aligned
};

template <class Do>
PALEY_INLINE void each_segment(const InputsLayout& layout, const Do& f) {
  for (int32_t from = 0; from < layout.group; from += layout.segment) {
    f(blocks_of(std::min(layout.segment, layout.group - from), layout.per));
  }
}

inline void zeros_up_to_a_tile(int64_t blocks, uint8_t* end) {
  if (blocks % 2) std::memset(end, 0, BLOCK_BYTES);
}

inline void write_panels(Written& w, WriteOut write, Lanes::Tables& tables) {
  const Matrix& matrix = w.task.matrix;
  const InputsLayout& layout = matrix.layout;
  for (int64_t p = 0; p < w.panels; ++p) {
    const uint8_t* record = w.records + p * matrix.panel_bytes;
    uint8_t* out = w.weights + p * w.bytes;
    for (int32_t g = 0; g < layout.columns / layout.group; ++g, record += matrix.group_bytes) {
      int64_t at = 0;
      each_segment(layout, [&](int64_t blocks) {
        write(tables, matrix.affine, record, at, blocks, out);
        zeros_up_to_a_tile(blocks, out + blocks * BLOCK_BYTES);
        at += blocks;
        out += 2 * tiles_of(blocks) * BLOCK_BYTES;
      });
    }
    if (!layout.outliers) continue;
    const int64_t blocks = blocks_of(layout.outliers, 4);
    typename Lanes::Tables plain(PALEY_BYTES, nullptr);
    write_out<PALEY_BYTES, false>(plain, false, record, 0, blocks, out);
    zeros_up_to_a_tile(blocks, out + blocks * BLOCK_BYTES);
  }
}

// Sums of M times WIDE tokens and N panels: of a segment, of a group, and all of them.
template <int M, int N>
struct WideSums {
  alignas(64) int32_t of_segment[M][N][16][16];
  alignas(64) float of_group[M][N][16][16];
  alignas(64) float y[M][N][16][16];
};

// After the products of a segment: the group's sums grow.
template <bool AFFINE, int M, int N>
PALEY_INLINE void add_segment(WideSums<M, N>& sums, const Inputs& in, int64_t token, int64_t segment,
                              const uint8_t* group, int64_t panel_bytes) {
  const Group<false, AFFINE> groups[2] = {{group}, {group + (N - 1) * panel_bytes}};
  const int64_t segments = in.layout.segments;
  for (int m = 0; m < M; ++m) {
    const int64_t at = (token + 16 * m) * segments + segment;
    for (int t = 0; t < 16; ++t) {
      const Floats step = Lanes::all(in.steps[at + t * segments]);
      PALEY_UNROLL for (int n = 0; n < N; ++n) {
        const Floats own = groups[n].centred(Lanes::load(sums.of_segment[m][n][t]), 0, in.sums[at + t * segments]);
        float* part = sums.of_group[m][n][t];
        Lanes::store(part, Lanes::add(Lanes::load(part), Lanes::mul(own, step)));
      }
    }
  }
}

// After the last segment of a group, whose sums begin anew: y += or = scale times them, then times `by`.
template <int M, int N>
PALEY_INLINE void add_group(WideSums<M, N>& sums, const uint8_t* group, int64_t panel_bytes, bool adds, float by) {
  for (int n = 0; n < N; ++n) {
    const Floats scales = Group<false, false>{group + n * panel_bytes}.scales(0), factor = Lanes::all(by);
    for (int m = 0; m < M; ++m) {
      for (int t = 0; t < 16; ++t) {
        float *part = sums.of_group[m][n][t], *y = sums.y[m][n][t];
        const Floats own = Lanes::mul(Lanes::load(part), scales);
        Lanes::store(y, Lanes::mul(Lanes::add(adds ? Lanes::load(y) : Lanes::zeros(), own), factor));
        Lanes::store(part, Lanes::zeros());
      }
    }
  }
}

template <bool AFFINE, int M, int N>
__attribute__((noinline)) void wide_tile(const Written& w, int64_t panel, int64_t token) {
  const Matrix& matrix = w.task.matrix;
  const Inputs& in = w.task.inputs;
  const InputsLayout& layout = matrix.layout;
  WideSums<M, N> sums;
  std::memset(sums.of_group, 0, sizeof sums.of_group);
  const uint8_t *weights = w.weights + panel * w.bytes, *record = w.records + panel * matrix.panel_bytes;
  const uint8_t* x = in.codes + token * layout.row_bytes;
  const int32_t groups = layout.columns / layout.group;
  int64_t segment = 0;
  for (int32_t g = 0; g < groups; ++g, record += matrix.group_bytes) {
    each_segment(layout, [&](int64_t blocks) {
      const int64_t tiles = tiles_of(blocks);
      Lanes::template wide<M, N>(x, layout.row_bytes, weights, w.bytes, tiles, sums.of_segment);
      add_segment<AFFINE, M, N>(sums, in, token, segment++, record, matrix.panel_bytes);
      x += 32 * blocks;
      weights += 2 * tiles * BLOCK_BYTES;
    });
    add_group<M, N>(sums, record, matrix.panel_bytes, g > 0, g == groups - 1 ? matrix.table_scale : 1.0f);
  }
  if (layout.outliers) {
    const int64_t tiles = tiles_of(blocks_of(layout.outliers, 4));
    Lanes::template wide<M, N>(x, layout.row_bytes, weights, w.bytes, tiles, sums.of_segment);
    add_segment<false, M, N>(sums, in, token, segment, record, matrix.panel_bytes);
    add_group<M, N>(sums, record, matrix.panel_bytes, true, 1.0f);
  }
  for (int n = 0; n < N; ++n) {
    const int32_t row = w.row + static_cast<int32_t>(panel + n) * PANEL_ROWS;
    const bool whole = row + PANEL_ROWS <= w.task.row_end;
    for (int t = 0; t < 16 * M; ++t) {
      const float* y = sums.y[t / 16][n][t % 16];
      if (whole) {
        Lanes::store(w.task.y + (token + t) * w.task.y_row + row, Lanes::load(y));
      } else {
        put(w.task, token + t, row, y);
      }
    }
  }
}

template <bool AFFINE, int M>
PALEY_INLINE void wide_tiles(const Written& w, int64_t token) {
  int64_t panel = 0;
  for (; panel + 2 <= w.panels; panel += 2) wide_tile<AFFINE, M, 2>(w, panel, token);
  if (panel < w.panels) wide_tile<AFFINE, M, 1>(w, panel, token);
}

// `tokens` tokens, a multiple of Lanes::WIDE.
template <bool AFFINE>
void wide_tokens(const MatmulTask& task, WriteOut write, Lanes::Tables& tables, int64_t tokens) {
  const Matrix& matrix = task.matrix;
  const InputsLayout& layout = matrix.layout;
  int64_t tiles = 0;
  each_segment(layout, [&](int64_t blocks) { tiles += tiles_of(blocks); });
  tiles = tiles * (layout.columns / layout.group) + tiles_of(blocks_of(layout.outliers, 4));
  const int64_t bytes = 2 * tiles * BLOCK_BYTES, most = std::clamp<int64_t>(WIDE_BYTES / bytes, 2, 8) / 2 * 2;
  const int64_t panels = std::min(most, divided_up(task.row_end - task.row_begin, PANEL_ROWS));
  Written w{task, 0, 0, bytes, nullptr, std::unique_ptr<uint8_t[]>(new uint8_t[panels * bytes + 63]), nullptr};
  w.weights = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(w.space.get()) + 63) / 64 * 64);
  [[maybe_unused]] const typename Lanes::Session session;
  for (w.row = task.row_begin; w.row < task.row_end; w.row += static_cast<int32_t>(panels) * PANEL_ROWS) {
    w.panels = std::min(panels, divided_up(task.row_end - w.row, PANEL_ROWS));
    w.records = matrix.panels + w.row / PANEL_ROWS * matrix.panel_bytes;
    write_panels(w, write, tables);
    int64_t token = 0;
    for (; token + 2 * Lanes::WIDE <= tokens; token += 2 * Lanes::WIDE) wide_tiles<AFFINE, 2>(w, token);
    if (token < tokens) wide_tiles<AFFINE, 1>(w, token);
  }
}
