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

// Eight tiles of 16 rows: 0 to 3 sums of two by two tiles, 4 and 5 inputs of 16 tokens, 6 and 7 weights of 16 rows.
constexpr TileShapes SHAPES{};

// Bytes of 16 tokens and more by AMX, all else by VNNI: tiles would be mostly empty.
struct Lanes : VnniLanes {
  static constexpr int TOKENS = 8, WIDE = 16;
  using Session = TileSession<SHAPES>;

  // sums [M][N][16 tokens][16 rows] = inputs times weights: `row` bytes lie between tokens, `panel` between the weights
  // of 16 rows; a tile has 16 dwords of each.
  template <int M, int N>
  static PALEY_INLINE void wide(const uint8_t* x, int64_t row, const uint8_t* weights, int64_t panel, int64_t tiles,
                                int32_t (*sums)[N][16][16]) {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
    for (; tiles; --tiles, x += 64, weights += 16 * 64) {
      _tile_loadd(4, x, row);
      _tile_loadd(6, weights, 64);
      _tile_dpbsud(0, 4, 6);
      if constexpr (M == 2) {
        _tile_loadd(5, x + 16 * row, row);
        _tile_dpbsud(2, 5, 6);
      }
      if constexpr (N == 2) {
        _tile_loadd(7, weights + panel, 64);
        _tile_dpbsud(1, 4, 7);
        if constexpr (M == 2) _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0][0], 64);
    if constexpr (N == 2) _tile_stored(1, sums[0][1], 64);
    if constexpr (M == 2) _tile_stored(2, sums[1][0], 64);
    if constexpr (M == 2 && N == 2) _tile_stored(3, sums[1][1], 64);
  }
};

#include "matmul_tiles.h"
#include "matmul_wide.h"
#include "matmul_kinds.h"
}  // namespace paley::amx
PALEY_TARGET_END
#endif
