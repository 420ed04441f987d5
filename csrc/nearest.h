// What the nearest-point search of each instruction set needs from its caller.
#pragma once

#include <stdint.h>

namespace paley {

struct NearestTask {
  const float* x;  // [count, p]
  int64_t count;
  const float* points;  // [n, p]
  int32_t n;
  int32_t p;
  int32_t threads;
  int32_t* codes;  // [count]
};

namespace avx512 {
void nearest(const NearestTask& task);
}
namespace avx2 {
void nearest(const NearestTask& task);
}
namespace portable {
void nearest(const NearestTask& task);
}

}  // namespace paley
