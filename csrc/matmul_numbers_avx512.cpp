#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matmul_numbers.h"

PALEY_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl")
namespace paley::numbers_avx512 {
#include "lanes_avx512.h"

#include "matmul_numbers_body.h"
}  // namespace paley::numbers_avx512
PALEY_TARGET_END

namespace paley {
const InputNumbers INPUTS_AVX512 = numbers_avx512::NUMBERS;
}  // namespace paley
#endif
