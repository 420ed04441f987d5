#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "paley.h"
#include "parallel.h"
#include "planes.h"
#include "planes_half.h"

namespace paley::portable {
#include "lanes_portable.h"

constexpr int TABLE_BYTES = 0;  // no tables
constexpr int tokens_at_once(int) { return 1; }
typedef uint32_t Words __attribute__((vector_size(16)));

struct Rows {
  Ints part[BLOCK / W];
};
struct Work {};

PALEY_INLINE Floats mul(Floats a, Floats b) { return a * b; }
// Fused as the instructions are, or y would depend on the machine; once for 32 columns or more.
PALEY_INLINE Floats fused(Floats a, Floats b, Floats c) {
  return Floats{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1]), std::fma(a[2], b[2], c[2]),
                std::fma(a[3], b[3], c[3])};
}
PALEY_INLINE Floats to_float(Ints a) { return __builtin_convertvector(a, Floats); }
PALEY_INLINE Floats load_half(const uint8_t* p) {
  uint16_t h[W];
  std::memcpy(h, p, sizeof h);
  return Floats{half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])};
}

PALEY_INLINE Words popcount(Words a) {
  a -= a >> 1 & 0x55555555u;
  a = (a & 0x33333333u) + (a >> 2 & 0x33333333u);
  a = (a + (a >> 4)) & 0x0f0f0f0fu;
  return a * 0x01010101u >> 24;
}

// sum_a 2^a popcount(X_a & map) - zero popcount(map), for each of the maps S, Q, S & Q.
template <int MAPS, int T>
void popcount_sums(const uint8_t* record, int words, const uint8_t* planes, int, const int32_t* zeros, const Work&,
                   Rows (&sums)[T][MAPS]) {
  static_assert(T == 1);
  for (int part = 0; part < BLOCK / W; ++part) {
    Words sum[MAPS] = {};
    for (int k = 0; k < words; ++k) {
      Words maps[3];
      std::memcpy(&maps[0], record + k * WORD_BYTES + 4 * W * part, sizeof maps[0]);
      std::memcpy(&maps[1], record + k * WORD_BYTES + 4 * W * part + 4 * BLOCK, sizeof maps[1]);
      maps[2] = maps[0] & maps[1];
      for (int m = 0; m < MAPS; ++m) sum[m] -= popcount(maps[m]) * static_cast<uint32_t>(zeros[0]);
      for (int a = 0; a < 4; ++a) {
        uint32_t plane;
        std::memcpy(&plane, planes + 4 * (a * words + k), sizeof plane);
        for (int m = 0; m < MAPS; ++m) sum[m] += popcount(maps[m] & plane) << a;
      }
    }
    for (int m = 0; m < MAPS; ++m) sums[0][m].part[part] = (Ints)sum[m];
  }
}

template <int MAPS, int T>
void dot_sums(const uint8_t*, int, const uint8_t*, int, const Work&, Rows (&)[T][MAPS]) {}
template <int MAPS, int T>
void table_sums(const uint8_t*, int, const uint8_t*, int, const Work&, Rows (&)[T][MAPS]) {}
template <int PATH, int MAPS>
void prepare_weights(const uint8_t*, int, int, Work&) {}
inline void make_tables(const uint8_t*, uint8_t*) {}

#include "planes_inputs.h"
#include "planes_product.h"

// One way serves all paths.
void planes_matmul(const PlanesTask& task) { product<PALEY_POPCOUNT>(task); }
}  // namespace paley::portable
