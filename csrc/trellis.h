// What rounding to a trellis-coded grid needs from its caller.
#pragma once

#include <stdint.h>

#include <cstring>

#include "paley.h"

namespace paley {

constexpr int TRELLIS_STATE_BITS = 12, STATES = 1 << TRELLIS_STATE_BITS;
constexpr int FARTHEST = 3840, GREATEST = 512;  // levels of what is rounded, and of a state's value, at most

template <class T>
T read(const void* p) {
  T a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

// Lane i of W has i / K.
template <int W, int K>
struct Repeats {
  alignas(W) uint8_t lanes[W] = {};
  constexpr Repeats() {
    for (int i = 0; i < W; ++i) lanes[i] = i / K;
  }
};
template <int W, int K>
constexpr Repeats<W, K> REPEATS;

struct TrellisTask {
  const paley_trellis& trellis;
  int32_t rows, columns, wide;
  const float* x;  // [rows, wide]
  int64_t x_row;
  const float* matrix;  // [columns, wide], or null: no feedback
  const float* scales;  // [rows, wide] by its strides
  int64_t scale_row, scale_column;
  int32_t keep, ahead, threads;
  const int32_t* ends;  // [rows], or null
  int32_t* states;      // [rows]
  int32_t* codes;       // [rows, steps]
  float* errors;        // [rows, columns], or null
};

namespace avx512 {
void trellis(const TrellisTask& task);
}
namespace avx2 {
void trellis(const TrellisTask& task);
}
namespace portable {
void trellis(const TrellisTask& task);
}

}  // namespace paley
