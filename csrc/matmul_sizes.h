// The sizes of a prepared matrix, and what its header may say.
#pragma once

#include <cmath>

#include "matmul_layout.h"

namespace paley {

constexpr int64_t MOST_COLUMNS = 1 << 16;  // sums of products of bytes stay below 2^31
constexpr int32_t MOST_FINE = 128;         // columns of a segment, likewise

inline bool good_kind(int32_t number, bool fine, int32_t per, bool affine) {
  if (number < 0 || number >= PALEY_KINDS) return false;
  const auto kind = static_cast<Kind>(number);
  const bool may_be_fine = is_look(kind) || kind == PALEY_TRELLIS5 || kind == PALEY_TRELLIS6;
  if (fine) return per == 2 && (may_be_fine ? !affine : is_plain(kind));
  if (kind == PALEY_WORDS || (is_look(kind) ? per != 3 && per != 4 : per != 4)) return false;
  return !affine || kind <= PALEY_TABLE4;
}

inline bool good_shape(int32_t out, int32_t columns, int32_t group, int32_t segment, int32_t outliers) {
  return out > 0 && columns > 0 && columns <= MOST_COLUMNS && group > 0 && columns % group == 0 && segment > 0 &&
         segment <= group && outliers >= 0 && outliers <= columns;
}

inline InputsLayout layout_of(int32_t columns, int32_t group, int32_t segment, int32_t per, int32_t outliers) {
  InputsLayout layout{columns, group, segment, per, 0, 0, outliers, 0};
  layout.segments_of_group = static_cast<int32_t>(divided_up(group, segment));
  layout.segments = columns / group * layout.segments_of_group + (outliers > 0);
  layout.row_bytes = 32 * (columns / group * blocks_of_group(layout) + blocks_of(outliers, per == 3 ? 4 : per));
  layout.row_bytes = divided_up(layout.row_bytes, 64) * 64;
  if (layout.row_bytes % 1024 == 0) layout.row_bytes += 64;  // else tokens side by side share few sets of a cache
  return layout;
}

struct Sizes {
  InputsLayout layout;
  int64_t group_bytes, panel_bytes, start, bytes;

  explicit Sizes(const MatrixHeader& h)
      : layout(layout_of(h.columns, h.group, h.segment, h.per, h.outliers)) {
    const auto kind = static_cast<Kind>(h.kind);
    const bool fine = h.fine != 0;
    group_bytes = parameter_bytes(kind, fine, h.affine != 0) + blocks_of_group(layout) * block_bytes(kind, fine);
    panel_bytes = h.columns / h.group * group_bytes + outlier_bytes(layout, fine);
    start = divided_up(int64_t{sizeof(MatrixHeader)} + h.table_bytes + 4 * int64_t{h.outliers}, 64) * 64;
    bytes = start + divided_up(h.out, PANEL_ROWS) * panel_bytes;
  }
};

inline bool good_header(const MatrixHeader& h) {
  const auto kind = static_cast<Kind>(h.kind);
  if ((h.fine != 0 && h.fine != 1) || (h.affine != 0 && h.affine != 1)) return false;
  if (!good_kind(h.kind, h.fine != 0, h.per, h.affine != 0)) return false;
  if (!good_shape(h.out, h.columns, h.group, h.segment, h.outliers)) return false;
  if (h.fine && h.segment > MOST_FINE) return false;
  const int32_t together = is_trellis(kind) ? trellis_columns(h.fine != 0) : 1;
  if (h.group % together || h.segment % together || (is_trellis(kind) && h.columns < 32)) return false;
  if (h.table_bytes != table_bytes(kind)) return false;
  return std::isfinite(h.table_scale);
}

}  // namespace paley
