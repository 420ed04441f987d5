#include "kv_cache.h"

namespace paley {

void Side::lay_out() {
  padded = (width + LANES - 1) / LANES * LANES;
  groups = bits == 16 ? 0 : width / group;
  row_bytes = bits == 16 ? int64_t{2} * width : (int64_t{width} * bits + 7) / 8;
  const int64_t rows = heads * PAGE;
  scales = (rows * row_bytes + ROOM + 1) / 2 * 2;
  zeros = scales + rows * groups * 2;
  bytes = zeros + (affine ? rows * groups : 0) + ROOM;
}

void pack_bits(const uint8_t* codes, int32_t n, int32_t bits, uint8_t* to, int64_t bytes) {
  uint64_t held = 0;
  int32_t count = 0;
  int64_t at = 0;
  for (int32_t i = 0; i < n; ++i) {
    held |= uint64_t{codes[i]} << count;
    for (count += bits; count >= 8; count -= 8, held >>= 8) to[at++] = static_cast<uint8_t>(held);
  }
  if (at < bytes) to[at] = static_cast<uint8_t>(held);
}

}  // namespace paley
