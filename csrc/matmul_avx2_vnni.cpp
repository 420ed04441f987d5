#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"

PALEY_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace paley::avx2_vnni {

constexpr int BIAS = 128;  // of integers in registers: vpdpbusd reads one side without signs

#include "matmul_avx2.h"
#include "matmul_floats_avx2.h"

struct Lanes : FloatLanes {
  static constexpr int WIDTH = 8, VECTORS = 2, CHAINS = 2, BIAS = 128, TOKENS = 4, WIDE = 0;
  using Tables = CodeTables;
  using Values = Ints;

  static PALEY_INLINE Values all(const uint8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm256_set1_epi32(word);
  }
  using FloatLanes::all;
  static PALEY_INLINE Ints dot_bytes(Ints sum, Ints w, Values x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
  static PALEY_INLINE Ints dot_words(Ints sum, Ints w, Values x) { return _mm256_dpwssd_avx_epi32(sum, w, x); }
  template <Kind KIND, bool FINE>
  static PALEY_INLINE void decode(const Tables& tables, const uint8_t* block, int step, int v, Ints& w0, Ints& w1) {
    decode_any<KIND, FINE>(tables, block, step, v, w0, w1);
  }
};

#include "matmul_tiles.h"
#include "matmul_kinds.h"
}  // namespace paley::avx2_vnni
PALEY_TARGET_END
#endif
