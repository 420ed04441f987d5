#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

namespace paley::portable {

// Plain loops, which compilers turn into what a machine has.
constexpr int W = 8;
struct Words {
  uint16_t lanes[W];
};

template <class Of>
PALEY_INLINE Words each(const Of& of) {
  Words a;
  for (int i = 0; i < W; ++i) a.lanes[i] = static_cast<uint16_t>(of(i));
  return a;
}
PALEY_INLINE int32_t with_sign(uint16_t a) { return static_cast<int16_t>(a); }
PALEY_INLINE Words all(uint16_t a) {
  return each([=](int) { return a; });
}
PALEY_INLINE Words load(const void* p) {
  Words a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE void store(void* p, const Words& a) { std::memcpy(p, &a, sizeof a); }
PALEY_INLINE Words less(const Words& a, const Words& b) {
  return each([&](int i) { return std::clamp(with_sign(a.lanes[i]) - with_sign(b.lanes[i]), -32768, 32767); });
}
PALEY_INLINE Words square(const Words& a) {
  return each([&](int i) { return (with_sign(a.lanes[i]) * with_sign(a.lanes[i]) + 16384) >> 15; });
}
PALEY_INLINE Words plus(const Words& a, const Words& b) {
  return each([&](int i) { return std::min(a.lanes[i] + b.lanes[i], 65535); });
}
PALEY_INLINE Words minus(const Words& a, const Words& b) {
  return each([&](int i) { return std::max(a.lanes[i] - b.lanes[i], 0); });
}
PALEY_INLINE Words min(const Words& a, const Words& b) {
  return each([&](int i) { return std::min(a.lanes[i], b.lanes[i]); });
}
PALEY_INLINE uint16_t least_of(const Words& a) { return *std::min_element(a.lanes, a.lanes + W); }

// Words p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Words spread_over(const uint16_t* p) {
  return each([=](int i) { return p[i / K]; });
}

#include "trellis_search.h"
}  // namespace paley::portable
