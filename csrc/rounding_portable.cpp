#include "rounding.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "parallel.h"
#include "platform.h"

namespace paley::portable {
#include "lanes_portable.h"

#include "mean.h"
#include "rounding_turn.h"
#include "rounding_token.h"
}  // namespace paley::portable
