#include "columns.h"

#include <new>

#include "platform.h"

namespace {

bool valid(const paley::ColumnsTask& task) {
  const paley_table& t = task.table;
  if (t.n < 1 || t.n > 65536 || t.p < 1 || t.p > 4) return false;
  if (task.rows < 0 || task.columns < 0 || task.threads < 1) return false;
  if (t.p > 1 && (!t.members || !t.starts || !t.bias || t.parts < 1 || t.own)) return false;
  return t.p > 1 || t.step > 0 || t.n == 1 || t.edges;
}

bool valid(const paley::FollowTask& task) {
  return task.rows >= 0 && task.columns >= 0 && task.width >= 0 && task.threads >= 1;
}

template <class Task, class Level>
int32_t run(const Task& task, int32_t level, const Level& at_level) {
  if (!valid(task) || level < PALEY_PORTABLE || level > paley_best_level()) return PALEY_BAD_ARGUMENT;
  if (task.rows == 0 || task.columns == 0) return PALEY_OK;
  try {
    at_level(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}

}  // namespace

extern "C" int32_t paley_feedback(const paley_table* table, int32_t rows, int32_t columns, const float* weights,
                                  int64_t weights_row, const float* spread, const float* scales, const float* zeros,
                                  int64_t scale_row, int64_t scale_column, int32_t level, int32_t threads,
                                  int32_t* codes, float* errors) {
  const paley::ColumnsTask task{*table, rows,  columns,   weights,      weights_row, spread, nullptr,
                                scales, zeros, scale_row, scale_column, threads,     codes,  errors};
  return run(task, level, [level](const paley::ColumnsTask& t) {
#if PALEY_X86
    if (level == PALEY_AVX512) return paley::avx512::feedback(t);
    if (level == PALEY_AVX2) return paley::avx2::feedback(t);
#endif
    paley::portable::feedback(t);
  });
}

extern "C" int32_t paley_descent(const paley_table* table, int32_t rows, int32_t columns, const float* pull,
                                 int64_t pull_row, const float* gram, const float* inverse, const float* scales,
                                 const float* zeros, int64_t scale_row, int64_t scale_column, int32_t level,
                                 int32_t threads, int32_t* codes, float* moves) {
  const paley::ColumnsTask task{*table, rows,  columns,   pull,         pull_row, gram,  inverse,
                                scales, zeros, scale_row, scale_column, threads,  codes, moves};
  return run(task, level, [level](const paley::ColumnsTask& t) {
#if PALEY_X86
    if (level == PALEY_AVX512) return paley::avx512::descent(t);
    if (level == PALEY_AVX2) return paley::avx2::descent(t);
#endif
    paley::portable::descent(t);
  });
}

extern "C" int32_t paley_follow(int32_t rows, int32_t columns, int32_t width, const float* moves, const float* gram,
                                int32_t level, int32_t threads, float* pull) {
  const paley::FollowTask task{rows, columns, width, threads, moves, gram, pull};
  return run(task, level, [level](const paley::FollowTask& t) {
#if PALEY_X86
    if (level == PALEY_AVX512) return paley::avx512::follow(t);
    if (level == PALEY_AVX2) return paley::avx2::follow(t);
#endif
    paley::portable::follow(t);
  });
}
