#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "paley.h"
#include "parallel.h"
#include "planes.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in gcc 12's own header
PALEY_TARGET_BEGIN("popcnt,avx2,fma,avx512f,avx512bw,avx512vbmi,avx512vnni,avx512vpopcntdq")
namespace paley::avx512 {
#include "lanes_avx512.h"

constexpr int TABLE_BYTES = 64;
// As many tokens at a time as registers hold their sums; from so many on the weights are unpacked once for all.
constexpr int tokens_at_once(int path) { return path == PALEY_DOTS ? 8 : 4; }
constexpr int kept_from(int path) { return path == PALEY_POPCOUNT ? 2 : 4; }

struct Rows {
  Ints part[1];
};
struct Work {
  Ints maps[MAX_WORDS][3], counts[3];  // popcount: the maps, and how many columns each has
  Ints bytes[MAX_WORDS * 8][2];        // dots: of each four columns first and second weight
};

PALEY_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
PALEY_INLINE Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
PALEY_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
PALEY_INLINE Floats load_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PALEY_INLINE Ints load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
PALEY_INLINE Ints load_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return all(four);
}

// S, Q, and both.
template <int MAPS>
PALEY_INLINE void load_maps(const uint8_t* record, int k, Ints (&maps)[MAPS]) {
  maps[0] = load_bytes(record + k * WORD_BYTES);
  maps[1] = load_bytes(record + k * WORD_BYTES + 64);
  if constexpr (MAPS == 3) maps[2] = _mm512_and_si512(maps[0], maps[1]);
}

#include "planes_avx512.h"

#include "planes_inputs.h"
#include "planes_product.h"

void planes_matmul(const PlanesTask& task) {
  switch (task.path) {
    case PALEY_POPCOUNT: return product<PALEY_POPCOUNT>(task);
    case PALEY_DOTS: return product<PALEY_DOTS>(task);
    case PALEY_TABLES: return product<PALEY_TABLES>(task);
  }
}
}  // namespace paley::avx512
PALEY_TARGET_END
#endif
