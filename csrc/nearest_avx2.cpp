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

PALEY_TARGET_BEGIN("popcnt,avx2,fma")
namespace paley::avx2 {
#include "lanes_avx2.h"

#include "nearest_list.h"
#include "nearest_search.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
