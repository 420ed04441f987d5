#include "matmul_numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "platform.h"

namespace paley::numbers_portable {
#include "lanes_portable.h"

#include "matmul_numbers_body.h"
}  // namespace paley::numbers_portable

namespace paley {
const InputNumbers INPUTS_PORTABLE = numbers_portable::NUMBERS;
}  // namespace paley
