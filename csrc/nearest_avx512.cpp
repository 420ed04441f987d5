#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>

#include "nearest.h"
#include "parallel.h"

PALEY_TARGET_BEGIN("popcnt,avx2,fma,avx512f")
namespace paley::avx512 {
#include "lanes_avx512.h"

#include "nearest_list.h"
#include "nearest_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
