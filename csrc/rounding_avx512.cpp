#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "parallel.h"
#include "rounding.h"

PALEY_TARGET_BEGIN("avx2,fma,avx512f")
namespace paley::avx512 {
#include "lanes_avx512.h"

#include "mean.h"
#include "rounding_turn.h"
#include "rounding_token.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
