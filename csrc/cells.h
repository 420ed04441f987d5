// Space in cells, each with the points of a grid that can be nearest to a vector in the cell.
#pragma once

#include <stdint.h>

#include "platform.h"

namespace paley {

// The part of a side that a lies in, or -1 beyond its ends.
PALEY_INLINE int32_t cell_of(float a, float low, float width, int32_t parts) {
  const float at = (a - low) / width;
  return at >= 0.0f && at < static_cast<float>(parts) ? static_cast<int32_t>(at) : -1;
}

}  // namespace paley
