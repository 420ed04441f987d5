#include "platform.h"

#if PALEY_X86
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>

#include "cells.h"
#include "columns.h"
#include "parallel.h"

PALEY_TARGET_BEGIN("avx2,avx512f")
namespace paley::avx512 {
#include "columns_rounding.h"
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
