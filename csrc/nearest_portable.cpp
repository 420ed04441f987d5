#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>

#include "nearest.h"
#include "parallel.h"
#include "platform.h"

namespace paley::portable {
#include "lanes_portable.h"

#include "nearest_list.h"
#include "nearest_search.h"
}  // namespace paley::portable
