#include "platform.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"

PALEY_TARGET_BEGIN("arch=armv8.2-a+dotprod")
namespace paley::neon {

// Tables as bytes; the look-ups of 256 points take four steps of 64.
struct CodeTables {
  uint8x16_t first;
  uint8x16x4_t wide[2][4];
  const uint8_t *table, *points;

  CodeTables(Kind kind, const uint8_t* table) : first(vdupq_n_u8(0)), wide{}, table(table), points(table) {
    if (kind <= PALEY_TABLE4) first = vld1q_u8(table);
    for (int at = 0; kind == PALEY_TABLE6 && at < 64; at += 16) wide[0][0].val[at / 16] = vld1q_u8(table + at);
    const int bytes = kind == PALEY_PAIRS4 ? 16 : kind == PALEY_PAIRS6 ? 64 : kind == PALEY_PAIRS8 ? 256 : 0;
    for (int at = 0; at < 2 * bytes; at += 16) {
      wide[at / bytes][at % bytes / 64].val[at % bytes % 64 / 16] = vld1q_u8(table + at);
    }
  }
  void own(const uint8_t* at) { points = at; }

  template <Kind KIND>
  PALEY_INLINE uint8x16_t pick(int i, uint8x16_t codes) const {
    if constexpr (KIND == PALEY_PAIRS4) return vqtbl1q_u8(wide[i][0].val[0], codes);
    uint8x16_t points = vqtbl4q_u8(wide[i][0], codes);
    if constexpr (KIND == PALEY_PAIRS8) {
      for (int k = 1; k < 4; ++k) points = vqtbx4q_u8(points, wide[i][k], vsubq_u8(codes, vdupq_n_u8(64 * k)));
    }
    return points;
  }
};

// Four rows, four bytes of each.
struct Lanes {
  static constexpr int WIDTH = 4, VECTORS = 4, CHAINS = 1, BIAS = 0, TOKENS = 4, WIDE = 0;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  using Tables = CodeTables;
  using Values = int32x4_t;

  static PALEY_INLINE Values all(const uint8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return vdupq_n_s32(word);
  }
  static PALEY_INLINE Ints dot_bytes(Ints sum, Ints w, Values x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
  }
  static PALEY_INLINE Ints dot_words(Ints sum, Ints w, Values x) {
    const int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(x);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
  }

  template <int COUNT>
  static PALEY_INLINE uint8x16_t right(uint8x16_t x) {
    if constexpr (COUNT == 0) return x;
    return vshrq_n_u8(x, COUNT ? COUNT : 1);
  }
  static PALEY_INLINE uint8x16_t low_bits(uint8x16_t x, int count) {
    return vandq_u8(x, vdupq_n_u8(static_cast<uint8_t>((1 << count) - 1)));
  }

  template <Kind KIND, int D>
  static PALEY_INLINE Ints look(const uint8_t* table, const uint8_t* block, int v) {
    constexpr int HIGH = look_high(KIND), BITS = D * HIGH;
    int32_t dwords[4];
    for (int r = 0; r < 4; ++r) {
      int code = block[D * 16 + 4 * v + r];
      if (HIGH) code |= (block[128 + BITS / 8 * 16 + 4 * v + r] >> BITS % 8 & ((1 << HIGH) - 1)) << 8;
      std::memcpy(dwords + r, table + 4 * code, 4);
    }
    return vld1q_s32(dwords);
  }

  // Part v of STEP of a block.
  template <Kind KIND, bool FINE, int STEP>
  static PALEY_INLINE void decode_at(const Tables& tables, const uint8_t* block, int v, Ints& w0, Ints& w1) {
    uint8x16_t a, b;
    if constexpr (KIND == PALEY_TABLE4) {
      const uint8x16_t codes = vld1q_u8(block + STEP * 64 + 16 * v);
      a = vqtbl1q_u8(tables.first, low_bits(codes, 4)), b = vqtbl1q_u8(tables.first, right<4>(codes));
    } else if constexpr (KIND == PALEY_TABLE6) {
      const uint8x16_t codes = vld1q_u8(block + STEP * 64 + 16 * v);
      const uint8x16_t high = right<4 * (STEP % 2)>(vld1q_u8(block + 256 + STEP / 2 * 64 + 16 * v));
      a = vorrq_u8(low_bits(codes, 4), vshlq_n_u8(low_bits(high, 2), 4));
      b = vorrq_u8(right<4>(codes), vshlq_n_u8(low_bits(right<2>(high), 2), 4));
      a = vqtbl4q_u8(tables.wide[0][0], a), b = vqtbl4q_u8(tables.wide[0][0], b);
    } else if constexpr (KIND == PALEY_TABLE2 || KIND == PALEY_TABLE3 || KIND == PALEY_OWN2) {
      const uint8x16_t codes = right<4 * (STEP % 2)>(vld1q_u8(block + STEP / 2 * 64 + 16 * v));
      a = low_bits(codes, 2), b = low_bits(right<2>(codes), 2);
      if constexpr (KIND == PALEY_TABLE3) {
        const uint8x16_t high = vld1q_u8(block + 128 + 16 * v), one = vdupq_n_u8(1);
        a = vorrq_u8(a, vshlq_n_u8(vandq_u8(right<2 * STEP>(high), one), 2));
        b = vorrq_u8(b, vshlq_n_u8(vandq_u8(right<2 * STEP + 1>(high), one), 2));
      }
      if constexpr (KIND == PALEY_OWN2) {
        static constexpr uint8_t ROWS[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
        const uint8x16_t rows = vld1q_u8(ROWS), table = vld1q_u8(tables.points + 16 * v);
        a = vqtbl1q_u8(table, vorrq_u8(a, rows)), b = vqtbl1q_u8(table, vorrq_u8(b, rows));
      } else {
        a = vqtbl1q_u8(tables.first, a), b = vqtbl1q_u8(tables.first, b);
      }
    } else if constexpr (KIND == PALEY_PAIRS4 || KIND == PALEY_PAIRS6 || KIND == PALEY_PAIRS8) {
      uint8x16_t codes;
      if constexpr (KIND == PALEY_PAIRS8) {
        codes = vld1q_u8(block + STEP * 64 + 16 * v);
      } else {
        codes = low_bits(right<4 * (STEP % 2)>(vld1q_u8(block + STEP / 2 * 64 + 16 * v)), 4);
      }
      if constexpr (KIND == PALEY_PAIRS6) {
        codes = vorrq_u8(codes, vshlq_n_u8(low_bits(right<2 * STEP>(vld1q_u8(block + 128 + 16 * v)), 2), 4));
      }
      const uint8x16_t even = tables.pick<KIND>(0, codes), odd = tables.pick<KIND>(1, codes);
      a = vzip1q_u8(even, odd), b = vzip2q_u8(even, odd);
    } else if constexpr (is_look(KIND)) {
      w0 = look<KIND, 2 * STEP>(tables.table, block, v), w1 = look<KIND, 2 * STEP + 1>(tables.table, block, v);
      return;
    } else if constexpr (is_trellis(KIND)) {
      using S = Stream<KIND, FINE>;
      uint8_t values[32] = {};
      for (int r = 0; r < (FINE ? 4 : 8); ++r) {
        S::values(tables.table, block, FINE ? STEP : 2 * STEP + r / 4, 4 * v + r % 4, values + 4 * r);
      }
      a = vld1q_u8(values), b = vld1q_u8(values + 16);
      if constexpr (FINE) {  // words of the first two values of each row, and of the others
        const uint32x4_t four = vreinterpretq_u32_u8(a);
        const uint8x8_t first = vreinterpret_u8_u16(vmovn_u32(four)), last = vreinterpret_u8_u16(vshrn_n_u32(four, 16));
        w0 = vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(first)));
        w1 = vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(last)));
        return;
      }
    } else if constexpr (KIND == PALEY_BYTES && FINE) {
      const auto words = [&](int d) {
        return vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(block + d * 32 + 8 * v))));
      };
      w0 = words(2 * STEP), w1 = words(2 * STEP + 1);
      return;
    } else {
      a = vld1q_u8(block + 2 * STEP * 64 + 16 * v), b = vld1q_u8(block + (2 * STEP + 1) * 64 + 16 * v);
    }
    w0 = vreinterpretq_s32_u8(a), w1 = vreinterpretq_s32_u8(b);
  }

  template <Kind KIND, bool FINE>
  static PALEY_INLINE void decode(const Tables& tables, const uint8_t* block, int step, int v, Ints& w0, Ints& w1) {
    switch (step) {
      case 0: return decode_at<KIND, FINE, 0>(tables, block, v, w0, w1);
      case 1: return decode_at<KIND, FINE, 1>(tables, block, v, w0, w1);
      case 2: return decode_at<KIND, FINE, 2>(tables, block, v, w0, w1);
      default: return decode_at<KIND, FINE, 3>(tables, block, v, w0, w1);
    }
  }

  static PALEY_INLINE Ints none() { return vdupq_n_s32(0); }
  static PALEY_INLINE Ints plus(Ints a, Ints b) { return vaddq_s32(a, b); }
  static PALEY_INLINE Ints load(const int32_t* p) { return vld1q_s32(p); }
  static PALEY_INLINE Ints load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static PALEY_INLINE void store(int32_t* p, Ints a) { vst1q_s32(p, a); }
  static PALEY_INLINE void store(uint8_t* p, Ints a) { vst1q_u8(p, vreinterpretq_u8_s32(a)); }
  static PALEY_INLINE Ints less(Ints sums, int32_t by) { return vsubq_s32(sums, vdupq_n_s32(by)); }
  static PALEY_INLINE Ints less_zeros(Ints sums, const uint8_t* zeros, int32_t bias, int32_t sum) {
    int32_t by[4];
    for (int r = 0; r < 4; ++r) by[r] = zeros[r] + bias;
    return vmlsq_s32(sums, vld1q_s32(by), vdupq_n_s32(sum));
  }
  static PALEY_INLINE Floats to_float(Ints a) { return vcvtq_f32_s32(a); }
  static PALEY_INLINE Floats zeros() { return vdupq_n_f32(0); }
  static PALEY_INLINE Floats all(float a) { return vdupq_n_f32(a); }
  static PALEY_INLINE Floats load(const float* p) { return vld1q_f32(p); }
  static PALEY_INLINE void store(float* p, Floats a) { vst1q_f32(p, a); }
  static PALEY_INLINE Floats load_halves(const uint8_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
  }
  static PALEY_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static PALEY_INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
};

#include "matmul_tiles.h"
#include "matmul_kinds.h"
}  // namespace paley::neon
PALEY_TARGET_END
#endif
