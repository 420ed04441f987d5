#include "scales.h"

#include <new>

#include "platform.h"

namespace {

bool valid(const paley::ScalesTask& task) {
  const paley_table& t = task.table;
  if (t.p != 1 || t.own || t.n < 1 || t.n > 65536 || (t.step <= 0 && t.n > 1 && !t.edges)) return false;
  return task.groups >= 0 && task.size >= 1 && task.period >= 1 && task.tries >= 1 && task.threads >= 1;
}

}  // namespace

extern "C" int32_t paley_search_scales(const paley_table* table, const float* x, int64_t groups, int32_t size,
                                       const float* importance, int64_t period, const float* scales,
                                       const float* zeros, int32_t tries, int32_t level, int32_t threads,
                                       int32_t* best) {
  const paley::ScalesTask task{*table, x, groups, size, importance, period, scales, zeros, tries, threads, best};
  if (!valid(task) || level < PALEY_PORTABLE || level > paley_best_level()) return PALEY_BAD_ARGUMENT;
  try {
#if PALEY_X86
    if (level == PALEY_AVX512) {
      paley::avx512::search_scales(task);
      return PALEY_OK;
    }
    if (level == PALEY_AVX2) {
      paley::avx2::search_scales(task);
      return PALEY_OK;
    }
#endif
    paley::portable::search_scales(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
