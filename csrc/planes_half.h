// float16 without an instruction for it.
#pragma once

#include <stdint.h>

#include <cstring>

namespace paley {

// Exact, for finite numbers.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  uint32_t bits = rest << 13;  // the exponent is too small by 112, which a product with 2^112 puts right, also for 0
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof bits);
  magnitude *= 0x1p112f;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits |= sign;
  std::memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
}

}  // namespace paley
