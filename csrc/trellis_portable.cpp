#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

namespace paley::portable {

// Plain loops, which compilers turn into what a machine has.
constexpr int W = 16;
struct Bytes {
  uint8_t lanes[W];
};

template <class Of>
PALEY_INLINE Bytes each(const Of& of) {
  Bytes a;
  for (int i = 0; i < W; ++i) a.lanes[i] = static_cast<uint8_t>(of(i));
  return a;
}
PALEY_INLINE Bytes all(uint8_t a) {
  return each([=](int) { return a; });
}
PALEY_INLINE Bytes load(const void* p) {
  Bytes a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE void store(void* p, const Bytes& a) { std::memcpy(p, &a, sizeof a); }
PALEY_INLINE Bytes plus(const Bytes& a, const Bytes& b) {
  return each([&](int i) { return std::min(a.lanes[i] + b.lanes[i], 255); });
}
PALEY_INLINE Bytes minus(const Bytes& a, const Bytes& b) {
  return each([&](int i) { return std::max(a.lanes[i] - b.lanes[i], 0); });
}
PALEY_INLINE Bytes min(const Bytes& a, const Bytes& b) {
  return each([&](int i) { return std::min(a.lanes[i], b.lanes[i]); });
}
PALEY_INLINE uint8_t least_of(const Bytes& a) { return *std::min_element(a.lanes, a.lanes + W); }

// Bytes p[0], p[0], .., p[1], ..: K of each.
template <int K>
PALEY_INLINE Bytes repeated(const uint8_t* p) {
  return each([=](int i) { return p[i / K]; });
}

#include "trellis_search.h"
}  // namespace paley::portable
