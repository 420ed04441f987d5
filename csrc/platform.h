// Differences between compilers and machines.
#pragma once

#if !defined(__GNUC__) && !defined(__clang__)
#error "the kernels use vector types of GCC and Clang; on Windows take MinGW or clang-cl"
#endif

#if defined(__x86_64__)
#define PALEY_X86 1
#else
#define PALEY_X86 0
#endif

// Functions written between BEGIN and END may use the instruction set; the rest of the library may not. Include
// standard headers before BEGIN: an inline function compiled for AVX-512 could otherwise be the one the linker keeps.
#define PALEY_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PALEY_TARGET_BEGIN(features) \
  PALEY_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PALEY_TARGET_END _Pragma("clang attribute pop")
#else
#define PALEY_TARGET_BEGIN(features) _Pragma("GCC push_options") PALEY_PRAGMA(GCC target(features))
#define PALEY_TARGET_END _Pragma("GCC pop_options")
#endif

#define PALEY_INLINE inline __attribute__((always_inline))

// Before a short loop: unrolled early, or GCC keeps the arrays that it runs over in memory instead of registers.
#if defined(__clang__)
#define PALEY_UNROLL PALEY_PRAGMA(unroll)
#define PALEY_UNROLL_16 PALEY_PRAGMA(unroll)
#else
#define PALEY_UNROLL PALEY_PRAGMA(GCC unroll 8)
#define PALEY_UNROLL_16 PALEY_PRAGMA(GCC unroll 16)
#endif

namespace paley {

// Position of the lowest set bit; bits != 0.
PALEY_INLINE int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }

}  // namespace paley
