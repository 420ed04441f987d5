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

PALEY_TARGET_BEGIN("popcnt,avx2,fma,f16c")
namespace paley::avx2 {
#include "lanes_avx2.h"

constexpr int TABLE_BYTES = 64;
constexpr int tokens_at_once(int path) { return path == PALEY_POPCOUNT ? 1 : 2; }

struct Rows {
  Ints part[2];
};
struct Work {
  Ints bytes[MAX_WORDS * 8][2][2];  // dots: of each four columns and eight rows first and second weight
  Ints indices[MAX_WORDS][6][2];    // tables: lower and upper halves of the bytes
};

PALEY_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
PALEY_INLINE Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
PALEY_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
PALEY_INLINE Floats load_half(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PALEY_INLINE Ints load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PALEY_INLINE Ints load_four(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return all(four);
}
// 16 bytes in both halves.
PALEY_INLINE Ints load_twice(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#include "planes_avx2.h"

#include "planes_inputs.h"
#include "planes_product.h"

void planes_matmul(const PlanesTask& task) {
  switch (task.path) {
    case PALEY_POPCOUNT: return product<PALEY_POPCOUNT>(task);
    case PALEY_DOTS: return product<PALEY_DOTS>(task);
    case PALEY_TABLES: return product<PALEY_TABLES>(task);
  }
}
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
