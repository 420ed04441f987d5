// Eight floats at a time by the vector types of GCC and Clang. Included inside a namespace; see wide_avx2.h.
constexpr int L = 8;  // lanes
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));

PALEY_INLINE F all(float a) { return F{a, a, a, a, a, a, a, a}; }
PALEY_INLINE F fused(F a, F b, F c) { return a * b + c; }
PALEY_INLINE F greatest(F a, F b) {
  const I more = a > b;
  return (F)((more & (I)a) | (~more & (I)b));
}
PALEY_INLINE F root(F a) {
  for (int i = 0; i < 8; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
PALEY_INLINE F to_float(I a) { return __builtin_convertvector(a, F); }

// points[at]: of sixteen, or of any number.
PALEY_INLINE F pick(const float* points, I at) {
  F found;
  for (int i = 0; i < 8; ++i) found[i] = points[at[i]];
  return found;
}
PALEY_INLINE F pick_of_16(const float* points, I at) { return pick(points, at); }

PALEY_INLINE float sum(F a) {
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
// The sum of each of four vectors.
PALEY_INLINE void sums(F a, F b, F c, F d, float* to) {
  to[0] = sum(a);
  to[1] = sum(b);
  to[2] = sum(c);
  to[3] = sum(d);
}

PALEY_INLINE float one_from_half(uint16_t x) { return half_to_float(x); }
// To the nearest, ties to even; the largest finite number for what is beyond it.
inline uint16_t one_to_half(float x) {
  if (x != x) return 0x7e00;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x477fe000) return static_cast<uint16_t>(sign | 0x7bff);
  if (bits < 0x38800000) {  // a multiple of 2^-24
    float size;
    std::memcpy(&size, &bits, sizeof size);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)));
  }
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
PALEY_INLINE F from_half(const uint16_t* p) {
  F found;
  for (int i = 0; i < 8; ++i) found[i] = half_to_float(p[i]);
  return found;
}
PALEY_INLINE void to_half(F a, uint16_t* p) {
  for (int i = 0; i < 8; ++i) p[i] = one_to_half(a[i]);
}
PALEY_INLINE F from_bfloat(const uint16_t* p) {
  U found;
  for (int i = 0; i < 8; ++i) found[i] = static_cast<uint32_t>(p[i]) << 16;
  return (F)found;
}

#include "wide_eight.h"
