#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine_abi.h"
#include "steps.h"

PALEY_TARGET_BEGIN("avx2,fma,f16c")
namespace paley::steps_avx2 {
#include "wide_avx2.h"

#include "steps_body.h"
#include "attention_body.h"
void attend(const AttendTask& task) { attend_with<NoIntegers>(task); }
}  // namespace paley::steps_avx2
PALEY_TARGET_END

namespace paley {

const Steps STEPS_AVX2 = {steps_avx2::norm,     steps_avx2::rotate, steps_avx2::base,
                          steps_avx2::gate,     steps_avx2::cap,    steps_avx2::plain,
                          steps_avx2::put_half, steps_avx2::attend, steps_avx2::join};

}  // namespace paley
#endif
