#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "parallel.h"
#include "scales.h"

namespace paley::portable {
#include "mean.h"
#include "scales_search.h"
}  // namespace paley::portable
