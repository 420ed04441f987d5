// What the search of a group's scale needs from its caller.
#pragma once

#include <stdint.h>

#include "paley.h"

namespace paley {

struct ScalesTask {
  const paley_table& table;
  const float* x;  // [groups, size]
  int64_t groups;
  int32_t size;
  const float* importance;  // [period, size], or null
  int64_t period;
  const float* scales;  // [groups, tries]
  const float* zeros;   // likewise, or null
  int32_t tries, threads;
  int32_t* best;  // [groups]
};

namespace avx512 {
void search_scales(const ScalesTask& task);
}
namespace avx2 {
void search_scales(const ScalesTask& task);
}
namespace portable {
void search_scales(const ScalesTask& task);
}

}  // namespace paley
