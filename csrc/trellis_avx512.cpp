#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

PALEY_TARGET_BEGIN("popcnt,avx2,fma,avx512f")
namespace paley::avx512 {
#include "lanes_avx512.h"

#include "trellis_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
