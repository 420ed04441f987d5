#include "rounding.h"

#include <new>

#include "platform.h"

namespace {

bool valid(const paley::RoundingTask& task) {
  const paley_rounding& how = task.how;
  if (how.in_dim < 1 || how.out_dim < how.in_dim || how.order < 1 || task.tokens < 0 || task.threads < 1) return false;
  if (how.out_dim % how.order || how.m < 1 || how.order % how.m) return false;
  const int32_t steps = how.order / how.m;
  if (steps & (steps - 1)) return false;
  if (task.tokens == 0) return true;
  if (how.back && (how.table || !how.dense)) return false;
  if (!how.table) return task.values;
  const paley_table& t = *how.table;
  if (t.p != 1 || t.own || t.n < 2 || t.n > 65536 || (t.step <= 0 && !t.edges)) return false;
  if (how.group_size < 1 || how.out_dim % how.group_size) return false;
  return task.values || (t.n <= 256 && task.codes && task.scales && (!how.affine || task.zeros));
}

}  // namespace

extern "C" int32_t paley_round(const paley_rounding* how, const float* x, int64_t tokens, const float* diagonal,
                               int32_t level, int32_t threads, float* values, uint8_t* codes, float* scales,
                               uint8_t* zeros) {
  const paley::RoundingTask task{*how, x, tokens, diagonal, threads, values, codes, scales, zeros};
  if (!valid(task) || level < PALEY_PORTABLE || level > paley_best_level()) return PALEY_BAD_ARGUMENT;
  if (tokens == 0) return PALEY_OK;
  try {
#if PALEY_X86
    if (level == PALEY_AVX512) {
      paley::avx512::round(task);
      return PALEY_OK;
    }
    if (level == PALEY_AVX2) {
      paley::avx2::round(task);
      return PALEY_OK;
    }
#endif
    paley::portable::round(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
