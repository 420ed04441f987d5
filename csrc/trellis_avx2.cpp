#include "platform.h"

#if PALEY_X86
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

PALEY_TARGET_BEGIN("avx2")
namespace paley::avx2 {
constexpr int LANES = 8;
#include "trellis_search.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
