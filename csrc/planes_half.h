// float16 without an instruction for it.
#pragma once

#include <stdint.h>

namespace paley {

// A finite float16 in units of 2^-24, the smallest one. In integers, so that subnormal numbers count even if the
// caller has set the processor to treat them as zeros (torch.set_flush_denormal).
inline int64_t half_units(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  const int64_t units = exponent ? int64_t{mantissa | 0x400} << (exponent - 1) : mantissa;
  return half & 0x8000 ? -units : units;
}

// Exact, for finite numbers: no factor is subnormal.
inline float half_to_float(uint16_t half) {
  const float magnitude = static_cast<float>(half_units(half & 0x7fff)) * 0x1p-24f;
  return half & 0x8000 ? -magnitude : magnitude;  // so that -0 keeps its sign, as with the instruction
}

}  // namespace paley
