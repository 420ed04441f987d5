#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine_abi.h"
#include "steps.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in gcc 12's own header
PALEY_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vnni")
namespace paley::steps_avx512 {
#include "wide_avx512.h"

#include "steps_body.h"
#include "attention_body.h"
#include "attention_integers.h"
void attend(const AttendTask& task) { attend_with<Integers>(task); }
}  // namespace paley::steps_avx512
PALEY_TARGET_END

namespace paley {

const Steps STEPS_AVX512 = {steps_avx512::norm,     steps_avx512::rotate, steps_avx512::base,
                            steps_avx512::gate,     steps_avx512::cap,    steps_avx512::plain,
                            steps_avx512::put_half, steps_avx512::attend, steps_avx512::join};

}  // namespace paley
#endif
