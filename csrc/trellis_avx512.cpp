#include "platform.h"

#if PALEY_X86
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

PALEY_TARGET_BEGIN("avx2,avx512f")
namespace paley::avx512 {
constexpr int LANES = 16;
#include "trellis_search.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
