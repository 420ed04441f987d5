// What wide_avx2.h and wide_portable.h share. Included inside a namespace by them.

// The sums of four vectors of each of R rows, `stride` floats apart.
template <int R>
PALEY_INLINE void sums(const F (&a)[R][4], float* to, int64_t stride) {
  for (int r = 0; r < R; ++r) sums(a[r][0], a[r][1], a[r][2], a[r][3], to + r * stride);
}

// The next L codes of B bits of a stream, from bit 0 of each lane on; above them may be others if B is 4 or less.
template <int B>
PALEY_INLINE I next_codes(const uint8_t* from) {
  if constexpr (B <= 4) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return (I)((U{} + word) >> U{0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B});
  } else {
    uint64_t words;
    std::memcpy(&words, from, sizeof words);
    const uint32_t a = static_cast<uint32_t>(words), b = static_cast<uint32_t>(words >> (4 * B));
    const U shifts = U{0, B, 2 * B, 3 * B, 0, B, 2 * B, 3 * B};
    return (I)((U{a, a, a, a, b, b, b, b} >> shifts) & ((1u << B) - 1));
  }
}

PALEY_INLINE F choose(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }

#include "wide_power.h"

// exp to 2 units in the last place, 0 below -87.3; NaN stays.
PALEY_INLINE F exponential(F x) {
  const I low = x < -87.3f, number = x == x;
  F y = choose(x > 88.3f, all(88.3f), choose(low, all(-87.3f), x));
  y = choose(number, y, all(0.0f));
  const F rounder = all(0x1.8p23f);
  const F whole = fused(y, all(1.44269504f), rounder) - rounder;
  F p = power_within(whole, y);
  const I power = __builtin_convertvector(whole, I) + 127;
  p *= (F)(power << 23);
  return choose(number, choose(low, all(0.0f), p), x);
}
