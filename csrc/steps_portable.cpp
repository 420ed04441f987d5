#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine_abi.h"
#include "planes_half.h"
#include "steps.h"

namespace paley {
namespace steps_portable {
#include "wide_portable.h"

#include "steps_body.h"
#include "attention_body.h"
void attend(const AttendTask& task) { attend_with<NoIntegers>(task); }
}  // namespace steps_portable

const Steps STEPS_PORTABLE = {steps_portable::norm,     steps_portable::rotate, steps_portable::base,
                              steps_portable::gate,     steps_portable::cap,    steps_portable::plain,
                              steps_portable::put_half, steps_portable::attend, steps_portable::join};

const Steps& steps_of(int32_t level) {
#if PALEY_X86
  level = std::min(level, paley_best_planes_level());
  if (level >= PALEY_AVX512) return STEPS_AVX512;
  if (level == PALEY_AVX2) return STEPS_AVX2;
#endif
  (void)level;
  return STEPS_PORTABLE;
}

}  // namespace paley
