#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "trellis.h"

namespace paley::portable {
#include "lanes_portable.h"

#include "trellis_search.h"
}  // namespace paley::portable
