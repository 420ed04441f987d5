#include "paley.h"
#include "platform.h"

extern "C" int32_t paley_abi_version(void) { return PALEY_ABI_VERSION; }

extern "C" int32_t paley_best_level(void) {
#if PALEY_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return PALEY_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PALEY_AVX2;
#endif
  return PALEY_PORTABLE;
}
