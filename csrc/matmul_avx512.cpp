#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in gcc 12's own header
PALEY_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")
namespace paley::avx512 {

#include "matmul_avx512.h"

struct Lanes : VnniLanes {
  static constexpr int TOKENS = 8, WIDE = 0;
};

#include "matmul_tiles.h"
#include "matmul_kinds.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
