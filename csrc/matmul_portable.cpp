#include <algorithm>
#include <cstring>
#include <memory>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "matmul_trellis.h"
#include "planes_half.h"

namespace paley::portable {

// Four rows, four bytes of each; plain loops, which compilers turn into what a machine has.
struct Lanes {
  static constexpr int WIDTH = 4, VECTORS = 4, CHAINS = 1, BIAS = 0, TOKENS = 4, WIDE = 0;
  struct Ints {
    int32_t rows[WIDTH];
  };
  struct Floats {
    float rows[WIDTH];
  };
  struct Values {
    uint8_t bytes[4];
  };
  struct Tables {
    const uint8_t *table, *points;
    Tables(Kind, const uint8_t* table) : table(table), points(table) {}
    void own(const uint8_t* at) { points = at; }
  };

  static PALEY_INLINE Ints none() { return {}; }
  static PALEY_INLINE Floats zeros() { return {}; }
  template <class T>
  static PALEY_INLINE T loaded(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static PALEY_INLINE Ints load(const int32_t* p) { return loaded<Ints>(p); }
  static PALEY_INLINE Ints load(const uint8_t* p) { return loaded<Ints>(p); }
  static PALEY_INLINE Floats load(const float* p) { return loaded<Floats>(p); }
  static PALEY_INLINE void store(int32_t* p, Ints a) { std::memcpy(p, &a, sizeof a); }
  static PALEY_INLINE void store(uint8_t* p, Ints a) { std::memcpy(p, &a, sizeof a); }
  static PALEY_INLINE void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
  static PALEY_INLINE Values all(const uint8_t* four) { return loaded<Values>(four); }
  static PALEY_INLINE Floats all(float a) { return {{a, a, a, a}}; }
  static PALEY_INLINE Ints plus(Ints a, Ints b) {
    for (int r = 0; r < WIDTH; ++r) a.rows[r] += b.rows[r];
    return a;
  }
  static PALEY_INLINE Ints less(Ints sums, int32_t by) {
    for (auto& sum : sums.rows) sum -= by;
    return sums;
  }
  static PALEY_INLINE Ints less_zeros(Ints sums, const uint8_t* zeros, int32_t bias, int32_t sum) {
    for (int r = 0; r < WIDTH; ++r) sums.rows[r] -= (zeros[r] + bias) * sum;
    return sums;
  }
  static PALEY_INLINE Floats to_float(Ints a) {
    Floats x;
    for (int r = 0; r < WIDTH; ++r) x.rows[r] = static_cast<float>(a.rows[r]);
    return x;
  }
  static PALEY_INLINE Floats load_halves(const uint8_t* p) {
    Floats x;
    for (int r = 0; r < WIDTH; ++r) x.rows[r] = half_to_float(loaded<uint16_t>(p + 2 * r));
    return x;
  }
  static PALEY_INLINE Floats add(Floats a, Floats b) {
    for (int r = 0; r < WIDTH; ++r) a.rows[r] += b.rows[r];
    return a;
  }
  static PALEY_INLINE Floats mul(Floats a, Floats b) {
    for (int r = 0; r < WIDTH; ++r) a.rows[r] *= b.rows[r];
    return a;
  }
  static PALEY_INLINE Ints dot_bytes(Ints sums, Ints weights, const Values& values) {
    int8_t w[4 * WIDTH], x[4];
    std::memcpy(w, &weights, sizeof w);
    std::memcpy(x, &values, sizeof x);
    for (int r = 0; r < WIDTH; ++r) {
      sums.rows[r] += w[4 * r] * x[0] + w[4 * r + 1] * x[1] + w[4 * r + 2] * x[2] + w[4 * r + 3] * x[3];
    }
    return sums;
  }
  static PALEY_INLINE Ints dot_words(Ints sums, Ints weights, const Values& values) {
    int16_t w[2 * WIDTH], x[2];
    std::memcpy(w, &weights, sizeof w);
    std::memcpy(x, &values, sizeof x);
    for (int r = 0; r < WIDTH; ++r) sums.rows[r] += w[2 * r] * x[0] + w[2 * r + 1] * x[1];
    return sums;
  }

  template <Kind KIND, bool FINE>
  static PALEY_INLINE void decode(const Tables& tables, const uint8_t* block, int step, int v, Ints& w0, Ints& w1) {
    dword<KIND, FINE>(tables, block, 2 * step, v, w0);
    dword<KIND, FINE>(tables, block, 2 * step + 1, v, w1);
  }

  // Dword d of four rows; see put_code in matmul.cpp.
  template <Kind KIND, bool FINE>
  static PALEY_INLINE void dword(const Tables& tables, const uint8_t* block, int d, int v, Ints& out) {
    uint8_t w[4 * WIDTH];
    const int step = d / 2, odd = d % 2;
    if constexpr (KIND == PALEY_WORDS || (KIND == PALEY_BYTES && !FINE)) {
      std::memcpy(w, block + d * 64 + v * 16, sizeof w);
    } else if constexpr (KIND == PALEY_BYTES) {
      for (int i = 0; i < 2 * WIDTH; ++i) {
        const int16_t value = static_cast<int8_t>(block[d * 32 + v * 8 + i]);
        std::memcpy(w + 2 * i, &value, sizeof value);
      }
    } else if constexpr (is_trellis(KIND)) {
      for (int r = 0; r < WIDTH; ++r) {
        uint8_t four[4];
        Stream<KIND, FINE>::values(tables.table, block, FINE ? step : d, v * WIDTH + r, four);
        for (int i = 0; i < 2 && FINE; ++i) {
          const int16_t value = static_cast<int8_t>(four[2 * odd + i]);
          std::memcpy(w + 4 * r + 2 * i, &value, sizeof value);
        }
        if (!FINE) std::memcpy(w + 4 * r, four, sizeof four);
      }
    } else if constexpr (is_look(KIND)) {
      constexpr int HIGH = look_high(KIND);
      for (int r = 0; r < WIDTH; ++r) {
        int code = block[d * 16 + v * WIDTH + r];
        if (HIGH) code |= (block[128 + d * HIGH / 8 * 16 + v * WIDTH + r] >> d * HIGH % 8 & ((1 << HIGH) - 1)) << 8;
        std::memcpy(w + 4 * r, tables.table + 4 * code, 4);
      }
    } else if constexpr (KIND == PALEY_PAIRS4 || KIND == PALEY_PAIRS6 || KIND == PALEY_PAIRS8) {
      constexpr int POINTS = KIND == PALEY_PAIRS4 ? 16 : KIND == PALEY_PAIRS6 ? 64 : 256;
      for (int i = 0; i < 2 * WIDTH; ++i) {
        const int at = v * 16 + odd * 8 + i;
        int code = KIND == PALEY_PAIRS8 ? block[step * 64 + at] : block[step / 2 * 64 + at] >> 4 * (step % 2) & 15;
        if (KIND == PALEY_PAIRS6) code |= (block[128 + at] >> 2 * step & 3) << 4;
        w[2 * i] = tables.table[code];
        w[2 * i + 1] = tables.table[POINTS + code];
      }
    } else {
      for (int i = 0; i < 4 * WIDTH; ++i) {
        const int at = v * 16 + i;
        int code;
        if constexpr (KIND == PALEY_TABLE4) {
          code = block[step * 64 + at] >> 4 * odd & 15;
        } else if constexpr (KIND == PALEY_TABLE6) {
          code = block[step * 64 + at] >> 4 * odd & 15;
          code |= (block[256 + step / 2 * 64 + at] >> d % 4 * 2 & 3) << 4;
        } else {
          code = block[step / 2 * 64 + at] >> (4 * (step % 2) + 2 * odd) & 3;
          if (KIND == PALEY_TABLE3) code |= (block[128 + at] >> d & 1) << 2;
        }
        w[i] = KIND == PALEY_OWN2 ? tables.points[16 * v + i / 4 * 4 + code] : tables.table[code];
      }
    }
    out = loaded<Ints>(w);
  }
};

#undef PALEY_UNROLL
#undef PALEY_UNROLL_16
#define PALEY_UNROLL_16
#define PALEY_UNROLL  // registers are no matter here, and compiling is
#include "matmul_tiles.h"
#include "matmul_kinds.h"
}  // namespace paley::portable
