#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"

PALEY_TARGET_BEGIN("avx2,fma,f16c")
namespace paley::avx2 {

constexpr int BIAS = 0;  // of integers in registers

#include "matmul_avx2.h"
#include "matmul_floats_avx2.h"

// Products of bytes by vpmaddubsw: pairs of |x| <= 128 and |w| <= 127 stay within 16 bits.
struct Lanes : FloatLanes {
  static constexpr int WIDTH = 8, VECTORS = 2, CHAINS = 1, BIAS = avx2::BIAS, TOKENS = 4, WIDE = 0;
  using Tables = CodeTables;
  struct Values {
    Ints x;
  };

  static PALEY_INLINE Values all(const uint8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return {_mm256_set1_epi32(word)};
  }
  using FloatLanes::all;
  static PALEY_INLINE Ints dot_bytes(Ints sum, Ints w, const Values& values) {
    const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(values.x), _mm256_sign_epi8(w, values.x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static PALEY_INLINE Ints dot_words(Ints sum, Ints w, const Values& values) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w, values.x));
  }
  template <Kind KIND, bool FINE>
  static PALEY_INLINE void decode(const Tables& tables, const uint8_t* block, int step, int v, Ints& w0, Ints& w1) {
    decode_any<KIND, FINE>(tables, block, step, v, w0, w1);
  }
};

#include "matmul_tiles.h"
#include "matmul_kinds.h"
}  // namespace paley::avx2
PALEY_TARGET_END
#endif
