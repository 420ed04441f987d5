#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matmul_numbers.h"

PALEY_TARGET_BEGIN("avx2,fma")
namespace paley::numbers_avx2 {
#include "lanes_avx2.h"

#include "matmul_numbers_body.h"
}  // namespace paley::numbers_avx2
PALEY_TARGET_END

namespace paley {
const InputNumbers INPUTS_AVX2 = numbers_avx2::NUMBERS;
}  // namespace paley
#endif
