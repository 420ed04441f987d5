#include "platform.h"

#if PALEY_X86
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "products.h"
#include "tiles.h"

PALEY_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
namespace paley::amx_bf16 {

constexpr TileShapes SHAPES{};  // 16 rows of 64 bytes: 16 pairs, or 16 sums

// 16 x 16 words, turned.
PALEY_INLINE void turn(__m512i (&x)[16]) {
  __m512i y[16];
  PALEY_UNROLL_16 for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  PALEY_UNROLL_16 for (int i = 0; i < 16; i += 4) {  // x[i + j]: column j of each four, of rows i..
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  PALEY_UNROLL_16 for (int j = 0; j < 4; ++j) {  // then fours, among the rows
    const __m512i low = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), high = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    y[j] = _mm512_shuffle_i32x4(low, low2, 0x88), y[j + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[j + 4] = _mm512_shuffle_i32x4(high, high2, 0x88), y[j + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  std::memcpy(&x, &y, sizeof x);
}

PALEY_INLINE __mmask16 first(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

struct Lanes {
  static constexpr int64_t TALL = 32, WIDE = 32, WORDS = 1, STEP = 16;
  using Session = TileSession<SHAPES>;

  // `run` columns of a panel's rows -> [steps, 32, 16] on the left, else [steps, 16, 32]; what is missing is 0.
  template <bool LEFT>
  static void pack(const ProductsTask::Matrix& x, int64_t rows, int64_t run, uint32_t* out) {
    for (int64_t at = 0; at < run; at += 32, out += 16 * 32) {
      for (int64_t half = 0; half < 2; ++half) {
        const float* start = x.start + 16 * half * x.row + at * x.column;
        __m512i words[16];
        const bool by_rows = block({start, x.row, x.column}, rows - 16 * half, run - at, words);
        if (by_rows != LEFT) turn(words);
        uint32_t* to = out + half * (LEFT ? 16 * 16 : 16);
        PALEY_UNROLL_16 for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * (LEFT ? 16 : 32), words[i]);
      }
    }
  }

  // 16 rows of 16 pairs in words; true: a row in each, false: a pair in each.
  static PALEY_INLINE bool block(const ProductsTask::Matrix& x, int64_t rows, int64_t run, __m512i (&words)[16]) {
    if (x.row == 1) {
      const __mmask16 mask = first(rows);
      PALEY_UNROLL_16 for (int i = 0; i < 16; ++i) {
        const __m512 even = _mm512_maskz_loadu_ps(2 * i < run ? mask : 0, x.start + 2 * i * x.column);
        const __m512 odd = _mm512_maskz_loadu_ps(2 * i + 1 < run ? mask : 0, x.start + (2 * i + 1) * x.column);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // 16 even ones, then 16 odd ones
        const __m512i apart = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        const __m512i upper = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        words[i] = _mm512_or_si512(apart, _mm512_slli_epi32(upper, 16));
      }
      return false;
    }
    float copy[16][32];
    const bool whole = x.column == 1;
    if (!whole) {
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t c = 0; c < 32; ++c) copy[r][c] = r < rows && c < run ? x.start[r * x.row + c * x.column] : 0.0f;
    }
    PALEY_UNROLL_16 for (int r = 0; r < 16; ++r) {
      const float* row = whole ? x.start + r * x.row : copy[r];
      const __m512 low = _mm512_maskz_loadu_ps(r < rows ? first(run) : 0, row);
      const __m512 high = _mm512_maskz_loadu_ps(r < rows ? first(run - 16) : 0, row + 16);
      words[r] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    return true;
  }

  // a [steps, 32, 16], b [steps, 16, 32] -> result [32, 32], in four tiles.
  static PALEY_INLINE void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* result) {
    constexpr int64_t row = 64, wide = 128, half = 16 * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; pairs > 0; pairs -= 16, a += 2 * half, b += 2 * half) {
      _tile_loadd(4, a, row);
      _tile_loadd(6, b, wide);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, wide);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + half, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, result, wide);
    _tile_stored(1, result + 16, wide);
    _tile_stored(2, result + 16 * 32, wide);
    _tile_stored(3, result + 16 * 32 + 16, wide);
  }
};

#include "products_tiles.h"
}  // namespace paley::amx_bf16
PALEY_TARGET_END
#endif
