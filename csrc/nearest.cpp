#include "nearest.h"

#include <new>

#include "paley.h"
#include "platform.h"

extern "C" int32_t paley_nearest_points(const float* x, int64_t count, const float* points, int32_t n, int32_t p,
                                        int32_t level, int32_t threads, int32_t* codes) {
  if (count < 0 || n < 1 || n > 65536 || p < 1 || p > 8 || threads < 1) return PALEY_BAD_ARGUMENT;
  if (level < PALEY_PORTABLE || level > paley_best_level()) return PALEY_BAD_ARGUMENT;
  if (count == 0) return PALEY_OK;
  const paley::NearestTask task{x, count, points, n, p, threads, codes};
  try {
#if PALEY_X86
    if (level == PALEY_AVX512) {
      paley::avx512::nearest(task);
      return PALEY_OK;
    }
    if (level == PALEY_AVX2) {
      paley::avx2::nearest(task);
      return PALEY_OK;
    }
#endif
    paley::portable::nearest(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
