#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"
#include "tiles.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms in gcc 12's own header
PALEY_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,amx-tile,amx-int8")
namespace paley::amx {

#include "matmul_avx512.h"

// Tiles: 0 sums [16 tokens, 16 rows]; 1 inputs of 16 dwords, 2 weights of 16 dwords; 3 and 4 likewise of 8.
constexpr TileShapes SHAPES{1, 0, {}, {64, 64, 64, 32, 64}, {16, 16, 16, 16, 8}};

// Of bytes and 16 tokens by AMX, all others by VNNI: tiles would be mostly empty.
struct Lanes : VnniLanes {
  static constexpr int TOKENS = 16, WIDE = 16;
  using Session = TileSession<SHAPES>;

  static PALEY_INLINE void wide(Ints (&sums)[16][1], const uint8_t* weights, const uint8_t* x, int64_t row,
                                int64_t dwords) {
    alignas(64) int32_t products[16][16];
    _tile_zero(0);
    for (; dwords >= 16; dwords -= 16, x += 64, weights += 16 * 64) {
      _tile_loadd(1, x, row);
      _tile_loadd(2, weights, 64);
      _tile_dpbsud(0, 1, 2);
    }
    if (dwords) {  // whole blocks, so 8
      _tile_loadd(3, x, row);
      _tile_loadd(4, weights, 64);
      _tile_dpbsud(0, 3, 4);
    }
    _tile_stored(0, products, 64);
    PALEY_UNROLL_16 for (int t = 0; t < 16; ++t) sums[t][0] = plus(sums[t][0], load(products[t]));
  }
};

#include "matmul_tiles.h"
}  // namespace paley::amx
PALEY_TARGET_END
#endif
