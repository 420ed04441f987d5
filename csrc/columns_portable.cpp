#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>

#include "cells.h"
#include "columns.h"
#include "parallel.h"

namespace paley::portable {
#include "columns_rounding.h"
}  // namespace paley::portable
