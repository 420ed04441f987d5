#include "kv_cache.h"

#include <algorithm>
#include <cstring>

namespace paley {

void Side::lay_out() {
  padded = (width + LANES - 1) / LANES * LANES;
  groups = bits == 16 ? 0 : width / group;
  row_bytes = 0;
  for (const int32_t p : {8, 4, 2, 1}) {
    if (bits != 16 && bits & p) {
      row_bytes += is_keys ? 4 * plane_units((width + QUAD - 1) / QUAD, p) : OCT * plane_units(padded / OCT, p);
    }
  }
  if (bits == 16) row_bytes = int64_t{2} * width;
  const int64_t rows = heads * PAGE;
  scales = (rows * row_bytes + ROOM + 1) / 2 * 2;
  zeros = scales + int64_t{heads} * groups * PAGE * 2;
  bytes = zeros + (affine ? int64_t{heads} * groups * PAGE : 0) + ROOM;
}

void Side::put_codes(uint8_t* half, int32_t head, int64_t place, const uint8_t* row) const {
  uint8_t* to = codes(half, head) + (is_keys ? 4 * place : place / 4 * 4 * row_bytes + place % 4);
  const int64_t together = is_keys ? QUAD : OCT, parts = (is_keys ? width + QUAD - 1 : padded) / together;
  int32_t below = 0;  // bits of the planes before
  for (const int32_t p : {8, 4, 2, 1}) {
    if (!(bits & p)) continue;
    for (int64_t unit = 0; unit < plane_units(parts, p); ++unit) {
      uint8_t held[OCT] = {};
      for (int32_t shift = 0; shift < 8; shift += p) {
        const int64_t first = (unit * 8 + shift) / p * together, last = std::min<int64_t>(first + together, width);
        for (int64_t i = first; i < last; ++i) {
          held[i - first] |= static_cast<uint8_t>((row[i] >> below & ((1 << p) - 1)) << shift);
        }
      }
      if (is_keys) {
        std::memcpy(to, held, QUAD);
        to += 4 * PAGE;
      } else {
        for (int64_t i = 0; i < OCT; ++i) to[4 * i] = held[i];
        to += 4 * OCT;
      }
    }
    below += p;
  }
}

void Side::put_halves(uint8_t* half, int32_t head, int64_t place, const uint16_t* row) const {
  auto* to = reinterpret_cast<uint16_t*>(codes(half, head));
  if (!is_keys) {
    std::copy_n(row, width, to + place * width);
    return;
  }
  for (int32_t i = 0; i < width; ++i) to[i * PAGE + place] = row[i];
}

}  // namespace paley
