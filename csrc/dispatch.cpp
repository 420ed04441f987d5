#include <cstdlib>
#include <cstring>

#include "matmul.h"
#include "paley.h"
#include "parallel.h"
#include "platform.h"

#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if PALEY_X86
#include <cpuid.h>

namespace {

// __builtin_cpu_supports accepts "f16c" only since GCC 11 and Clang 18; older compilers reject it. Whether the
// system keeps the registers is part of its "avx2".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// As with "f16c": the name "avx512bf16" is too new. Its registers are those of AVX-512F.
bool has_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;

// AMX of such numbers, and the system lets this process use the registers. Linux gives them only to those who ask.
bool may_use_tiles(unsigned numbers) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_TILE) || !(d & numbers)) return false;
#if defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

}  // namespace
#elif defined(__aarch64__)
namespace {

bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
  return true;  // every Arm Mac has them
#endif
}

}  // namespace
#endif

extern "C" int32_t paley_abi_version(void) { return PALEY_ABI_VERSION; }

extern "C" int32_t paley_borrow_threads(void* parallel) {
  paley::borrowed = reinterpret_cast<paley::Parallel>(parallel);
  return PALEY_OK;
}

extern "C" int32_t paley_best_level(void) {
#if PALEY_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return PALEY_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PALEY_AVX2;
#endif
  return PALEY_PORTABLE;
}

// Whatever the files planes_*.cpp are compiled for must be there.
extern "C" int32_t paley_best_planes_level(void) {
#if PALEY_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PALEY_PORTABLE;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vpopcntdq")) {
    return PALEY_AVX512;
  }
  if (has_f16c()) return PALEY_AVX2;
#endif
  return PALEY_PORTABLE;
}

extern "C" int32_t paley_best_products_level(void) {
#if PALEY_X86
  __builtin_cpu_init();
  const bool whole = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (paley_best_level() == PALEY_AVX512 && whole && has_bf16()) {
    static const bool tiles = may_use_tiles(AMX_BF16);
    return tiles ? PALEY_AMX_BF16 : PALEY_AVX512_BF16;
  }
#endif
  return paley_best_level();
}

extern "C" int32_t paley_matmul_levels(void) {
  int32_t levels = 1 << PALEY_PORTABLE;
#if PALEY_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return levels;
  levels |= 1 << PALEY_AVX2;
  if (has_avx_vnni()) levels |= 1 << PALEY_AVX2_VNNI;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni")) {
    levels |= 1 << PALEY_AVX512;
    static const bool tiles = may_use_tiles(AMX_INT8);
    if (tiles) levels |= 1 << PALEY_AMX;
  }
#elif defined(__aarch64__)
  if (has_dot_products()) levels |= 1 << PALEY_NEON;
#endif
  return levels;
}

extern "C" int32_t paley_best_matmul_level(void) {
  // From the best down; a name that is unknown, or of a level that is missing, changes nothing.
  static constexpr struct {
    int32_t level;
    const char* name;
  } levels[] = {{PALEY_AMX, "amx"},   {PALEY_AVX512, "avx512"}, {PALEY_AVX2_VNNI, "avx2_vnni"},
                {PALEY_AVX2, "avx2"}, {PALEY_NEON, "neon"},     {PALEY_PORTABLE, "portable"}};
  const int32_t here = paley_matmul_levels();
  const char* wanted = std::getenv("PALEY_ISA");
  for (const auto& one : levels) {
    if (wanted && (here >> one.level & 1) && !std::strcmp(wanted, one.name)) return one.level;
  }
  for (const auto& one : levels) {
    if (here >> one.level & 1) return one.level;
  }
  return PALEY_PORTABLE;
}

namespace paley {
int32_t best_matmul_level() { return paley_best_matmul_level(); }
}  // namespace paley
