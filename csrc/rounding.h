// What rounding the values of tokens needs from its caller.
#pragma once

#include <stdint.h>

#include "paley.h"

namespace paley {

struct RoundingTask {
  const paley_rounding& how;
  const float* x;  // [tokens, in_dim]
  int64_t tokens;
  const float* diagonal;  // [in_dim], or null
  int32_t threads;
  float* values;   // [tokens, out_dim], or null:
  uint8_t* codes;  // [tokens, out_dim]
  float* scales;   // [tokens, groups]
  uint8_t* zeros;  // likewise, affine grids only
};

namespace avx512 {
void round(const RoundingTask& task);
}
namespace avx2 {
void round(const RoundingTask& task);
}
namespace portable {
void round(const RoundingTask& task);
}

}  // namespace paley
