#include "platform.h"

#if PALEY_X86
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "parallel.h"
#include "scales.h"

PALEY_TARGET_BEGIN("avx2,avx512f")
namespace paley::avx512 {
#include "mean.h"
#include "scales_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
