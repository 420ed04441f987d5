// Rounds a block of columns code by code, once for each instruction set: included inside a namespace.
//
// Rows are independent: a thread takes a few at a time and walks their columns side by side, so that the search of one
// row overlaps with the arithmetic of another. Each float32 operation is rounded by itself, in the
// order of the torch reference (src/paley/methods/columns.py): the results are the same to the bit on every level.

constexpr int ROWS = 8;  // of a tile

template <int P>
struct Rounder {
  const paley_table& table;

  // y [P] -> the code of the nearest point.
  PALEY_INLINE int32_t nearest(const float* y, int row) const {
    if constexpr (P == 1) {
      return nearest_value(y[0], row);
    } else {
      return nearest_vector(y);
    }
  }

  PALEY_INLINE const float* point(int32_t code, int row) const {
    return table.points + (table.own ? int64_t{row} * table.n : 0) + int64_t{code} * P;
  }

  PALEY_INLINE int32_t nearest_value(float y, int row) const {
    const int32_t last = table.n - 1;
    if (table.step > 0) {
      float at = std::nearbyintf((y - table.first) / table.step);
      at = at > 0.0f ? at : 0.0f;  // NaN too
      return static_cast<int32_t>(at < static_cast<float>(last) ? at : static_cast<float>(last));
    }
    const float* edges = table.edges + (table.own ? int64_t{row} * last : 0);
    int32_t below = 0;
    for (int32_t k = 0; k < last; ++k) below += y > edges[k];
    return below;
  }

  // In float64 the products are exact: these are the scores that paley.h defines for paley_nearest_points.
  PALEY_INLINE int32_t nearest_vector(const float* y) const {
    double x[P];
    int64_t cell = 0;
    for (int i = 0; i < P; ++i) {
      float a = y[i] == y[i] ? y[i] : 0.0f;
      a = a < FLT_MAX ? a : FLT_MAX;
      a = a > -FLT_MAX ? a : -FLT_MAX;
      x[i] = a;
      const int32_t part = cell_of(a, table.low[i], table.width[i], table.parts);
      cell = part < 0 || cell < 0 ? -1 : cell * table.parts + part;
    }
    Best best;
    if (cell < 0) {  // far out
      for (int32_t j = 0; j < table.n; ++j) best.offer(j, score(x, j));
    } else {
      const uint16_t* const end = table.members + table.starts[cell + 1];
      for (const uint16_t* j = table.members + table.starts[cell]; j != end; ++j) best.offer(*j, score(x, *j));
    }
    return best.at;
  }

  struct Best {
    double score = -INFINITY;
    int32_t at = 0;

    PALEY_INLINE void offer(int32_t j, double other) {
      const bool better = other > score;
      score = better ? other : score;
      at = better ? j : at;
    }
  };

  PALEY_INLINE double score(const double* x, int32_t j) const {
    const float* c = table.points + int64_t{j} * P;
    double sum = table.bias[j];
    for (int i = 0; i < P; ++i) sum += x[i] * c[i];
    return sum;
  }
};

template <int P>
struct Tile {
  const ColumnsTask& task;
  const Rounder<P> rounder{task.table};
  const int codes = (task.columns + P - 1) / P;
  const int stride = codes * P;
  std::unique_ptr<float[]> work{new float[ROWS * static_cast<size_t>(stride)]};

  explicit Tile(const ColumnsTask& task) : task(task) {}

  void load(int first, int rows) {
    for (int r = 0; r < rows; ++r) {
      const float* x = task.x + (first + r) * task.x_row;
      std::copy(x, x + task.columns, work.get() + r * stride);
      std::fill(work.get() + r * stride + task.columns, work.get() + (r + 1) * stride, 0.0f);
    }
  }

  PALEY_INLINE float scale(int row, int column) const {
    return task.scales[row * task.scale_row + column * task.scale_column];
  }
  PALEY_INLINE float zero(int row, int column) const {
    return task.zeros[row * task.scale_row + column * task.scale_column];
  }

  // x [size] of a row, the columns from `start` on -> code and its values.
  PALEY_INLINE int32_t round(const float* x, int row, int start, int size, float* values) const {
    float y[P];
    for (int i = 0; i < P; ++i) {
      y[i] = i < size ? x[i] / scale(row, start + i) : 0.0f;
      if (task.zeros && i < size) y[i] += zero(row, start + i);
    }
    const int32_t code = rounder.nearest(y, row);
    decode(code, row, start, size, values);
    return code;
  }

  PALEY_INLINE void decode(int32_t code, int row, int start, int size, float* values) const {
    const float* point = rounder.point(code, row);
    for (int i = 0; i < P; ++i) {
      if (i >= size) {
        values[i] = 0.0f;
        continue;
      }
      const float at = task.zeros ? point[i] - zero(row, start + i) : point[i];
      values[i] = at * scale(row, start + i);
    }
  }

  // work[from ..] -= sum_i change_i matrix[start + i, from ..]
  PALEY_INLINE void spread(float* work, const float* change, int start, int size, int from) const {
    const int n = task.columns - from;
    const float* m = task.matrix + int64_t{start} * task.columns + from;
    float* w = work + from;
    if (size == P) {
      for (int k = 0; k < n; ++k) {
        float a = w[k];
        for (int i = 0; i < P; ++i) a -= change[i] * m[int64_t{i} * task.columns + k];
        w[k] = a;
      }
      return;
    }
    for (int i = 0; i < size; ++i) {
      for (int k = 0; k < n; ++k) w[k] -= change[i] * m[int64_t{i} * task.columns + k];
    }
  }

  void feedback(int first, int rows) {
    load(first, rows);
    for (int j = 0; j < codes; ++j) {
      const int start = j * P, size = std::min(P, task.columns - start);
      const float* diagonal = task.matrix + int64_t{start} * task.columns + start;  // upper triangular, p x p
      for (int r = 0; r < rows; ++r) {
        const int row = first + r;
        float* x = work.get() + r * stride;
        float values[P], error[P];
        task.codes[int64_t{row} * codes + j] = round(x + start, row, start, size, values);
        // The columns of one code are rounded together: the feedback between their errors is taken back.
        for (int i = 0; i < size; ++i) {
          float e = x[start + i] - values[i];
          for (int k = 0; k < i; ++k) e -= error[k] * diagonal[int64_t{k} * task.columns + i];
          error[i] = e / diagonal[int64_t{i} * task.columns + i];
          task.change[int64_t{row} * task.columns + start + i] = error[i];
        }
        spread(x, error, start, size, start + size);
      }
    }
  }

  void descent(int first, int rows) {
    load(first, rows);
    for (int j = 0; j < codes; ++j) {
      const int start = j * P, size = std::min(P, task.columns - start);
      const float* own = task.matrix + int64_t{start} * task.columns + start;
      const float* inverse = task.inverse + int64_t{j} * P * P;
      for (int r = 0; r < rows; ++r) {
        const int row = first + r;
        float* force = work.get() + r * stride;
        int32_t& code = task.codes[int64_t{row} * codes + j];
        float old[P], best[P], values[P], move[P];
        decode(code, row, start, size, old);
        for (int i = 0; i < size; ++i) {
          float a = old[i];
          for (int k = 0; k < size; ++k) a += force[start + k] * inverse[k * P + i];
          best[i] = a;
        }
        const int32_t nearest = round(best, row, start, size, values);
        float gain = 0.0f;
        for (int i = 0; i < size; ++i) move[i] = values[i] - old[i];
        for (int i = 0; i < size; ++i) {
          float slope = 2.0f * force[start + i];
          for (int k = 0; k < size; ++k) slope -= move[k] * own[int64_t{k} * task.columns + i];
          gain += slope * move[i];
        }
        // The nearest point is not always the best one in the metric of `own`.
        const bool gains = gain > 0.0f;
        if (gains) code = nearest;
        for (int i = 0; i < size; ++i) {
          task.change[int64_t{row} * task.columns + start + i] = gains ? move[i] : 0.0f;
        }
        if (gains) spread(force, move, start, size, start + size);
      }
    }
  }
};

template <int P, bool DESCENT>
void walk(const ColumnsTask& task) {
  std::atomic<int> next{0};
  run_workers(task.threads, [&] {
    Tile<P> tile(task);
    for (int first; (first = next.fetch_add(ROWS)) < task.rows;) {
      const int rows = std::min(ROWS, task.rows - first);
      if constexpr (DESCENT) {
        tile.descent(first, rows);
      } else {
        tile.feedback(first, rows);
      }
    }
  });
}

template <bool DESCENT>
void walk_in(const ColumnsTask& task) {
  switch (task.table.p) {
    case 1: return walk<1, DESCENT>(task);
    case 2: return walk<2, DESCENT>(task);
    case 3: return walk<3, DESCENT>(task);
    case 4: return walk<4, DESCENT>(task);
  }
}

void feedback(const ColumnsTask& task) { walk_in<false>(task); }
void descent(const ColumnsTask& task) { walk_in<true>(task); }

// Nearly all moves are 0: a product of matrices would do a hundred times the work.
void follow(const FollowTask& task) {
  std::atomic<int> next{0};
  run_workers(task.threads, [&] {
    for (int first; (first = next.fetch_add(ROWS)) < task.rows;) {
      for (int row = first; row < std::min(first + ROWS, task.rows); ++row) {
        float* pull = task.pull + int64_t{row} * task.width;
        for (int k = 0; k < task.columns; ++k) {
          const float move = task.moves[int64_t{row} * task.columns + k];
          if (move == 0.0f) continue;
          const float* gram = task.gram + int64_t{k} * task.width;
          for (int i = 0; i < task.width; ++i) pull[i] -= move * gram[i];
        }
      }
    }
  });
}
