#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

namespace paley::portable {
constexpr int LANES = 4;
#include "trellis_search.h"
}  // namespace paley::portable
