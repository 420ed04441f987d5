#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "matmul_layout.h"
#include "matmul_levels.h"
#include "planes_half.h"

namespace paley {
namespace {

constexpr int64_t MOST_COLUMNS = 1 << 16;  // sums of products of bytes stay below 2^31
constexpr int32_t MOST_FINE = 128;         // columns of a segment, likewise

bool good_kind(int32_t number, bool fine, int32_t per, bool affine) {
  if (number < 0 || number >= PALEY_KINDS) return false;
  const auto kind = static_cast<Kind>(number);
  if (fine) return per == 2 && (is_look(kind) ? !affine : is_plain(kind));
  if (kind == PALEY_WORDS || (is_look(kind) ? per != 3 && per != 4 : per != 4)) return false;
  return !affine || kind <= PALEY_TABLE4;
}

bool good_shape(int32_t out, int32_t columns, int32_t group, int32_t segment, int32_t outliers) {
  return out > 0 && columns > 0 && columns <= MOST_COLUMNS && group > 0 && columns % group == 0 && segment > 0 &&
         segment <= group && outliers >= 0 && outliers <= columns;
}

InputsLayout layout_of(int32_t columns, int32_t group, int32_t segment, int32_t per, int32_t outliers) {
  InputsLayout layout{columns, group, segment, per, 0, 0, outliers, 0};
  layout.segments_of_group = static_cast<int32_t>(divided_up(group, segment));
  layout.segments = columns / group * layout.segments_of_group + (outliers > 0);
  layout.row_bytes = 32 * (columns / group * blocks_of_group(layout) + blocks_of(outliers, per == 3 ? 4 : per));
  return layout;
}

struct Sizes {
  InputsLayout layout;
  int64_t group_bytes, panel_bytes, start, bytes;

  Sizes(const MatrixHeader& h)
      : layout(layout_of(h.columns, h.group, h.segment, h.per, h.outliers)) {
    const auto kind = static_cast<Kind>(h.kind);
    const bool fine = h.fine != 0;
    group_bytes = parameter_bytes(kind, h.affine != 0) + blocks_of_group(layout) * block_bytes(kind, fine);
    panel_bytes = h.columns / h.group * group_bytes + outlier_bytes(layout, fine);
    start = divided_up(int64_t{sizeof(MatrixHeader)} + h.table_bytes + 4 * int64_t{h.outliers}, 64) * 64;
    bytes = start + divided_up(h.out, PANEL_ROWS) * panel_bytes;
  }
};

bool good_header(const MatrixHeader& h) {
  const auto kind = static_cast<Kind>(h.kind);
  if ((h.fine != 0 && h.fine != 1) || (h.affine != 0 && h.affine != 1)) return false;
  if (!good_kind(h.kind, h.fine != 0, h.per, h.affine != 0)) return false;
  if (!good_shape(h.out, h.columns, h.group, h.segment, h.outliers)) return false;
  if (h.fine && h.segment > MOST_FINE) return false;
  if (h.table_bytes != table_bytes(kind)) return false;
  return std::isfinite(h.table_scale);
}

Kind kind_of(const MatrixSource& s) { return static_cast<Kind>(s.kind); }

bool header_of(const MatrixSource& s, MatrixHeader* h) {
  if (s.kind < 0 || s.kind >= PALEY_KINDS || s.p < 1 || s.p > 8) return false;
  const bool look = is_look(kind_of(s));
  const int32_t per = s.fine ? 2 : look ? s.p : 4;
  *h = {MATRIX_MAGIC, s.out, s.columns, s.group, s.segment, s.kind, s.fine, per, s.affine,
        s.outliers, s.table_scale, static_cast<int32_t>(table_bytes(kind_of(s))), 0, {}};
  if (!good_header(*h)) return false;
  const bool pairs = s.kind >= PALEY_PAIRS4 && s.kind <= PALEY_PAIRS8;
  if (pairs && s.p != 2) return false;
  if (look && s.p != per) return false;
  if (!pairs && !look && !is_plain(kind_of(s)) && s.p != 1) return false;
  // A code does not run across segments.
  if (!is_plain(kind_of(s)) && (s.group % s.p || (s.segment != s.group && s.segment % s.p))) return false;
  h->bytes = Sizes(*h).bytes;
  return true;
}

// Code positions of a block: for dword d of row r, value or code i.
void put_bits(uint8_t* at, int shift, uint32_t code) { *at = static_cast<uint8_t>(*at | code << shift); }

void put_code(Kind kind, uint8_t* block, int d, int r, int i, uint32_t code) {
  const int step = d / 2, odd = d % 2, single = r * 4 + i;
  const int pair = r / 4 * 16 + odd * 8 + r % 4 * 2 + i;
  switch (kind) {
    case PALEY_TABLE4: return put_bits(block + step * 64 + single, 4 * odd, code);
    case PALEY_TABLE2:
    case PALEY_OWN2: return put_bits(block + step / 2 * 64 + single, 4 * (step % 2) + 2 * odd, code);
    case PALEY_TABLE3:
      put_bits(block + step / 2 * 64 + single, 4 * (step % 2) + 2 * odd, code & 3);
      return put_bits(block + 128 + single, d, code >> 2);
    case PALEY_PAIRS4: return put_bits(block + step / 2 * 64 + pair, 4 * (step % 2), code);
    case PALEY_PAIRS6:
      put_bits(block + step / 2 * 64 + pair, 4 * (step % 2), code & 15);
      return put_bits(block + 128 + pair, 2 * step, code >> 4);
    case PALEY_PAIRS8: block[step * 64 + pair] = static_cast<uint8_t>(code); return;
    default: {
      const int high = look_high(kind);
      block[d * 16 + r] = static_cast<uint8_t>(code);
      if (high) put_bits(block + 128 + d * high / 8 * 16 + r, d * high % 8, code >> 8);
    }
  }
}

void put_value(Kind kind, bool fine, uint8_t* block, int d, int r, int i, int16_t value) {
  if (kind == PALEY_WORDS) {
    std::memcpy(block + d * 64 + r * 4 + 2 * i, &value, sizeof value);
  } else {
    block[fine ? d * 32 + r * 2 + i : d * 64 + r * 4 + i] = static_cast<uint8_t>(value);
  }
}

// The table as a kind reads it.
void put_table(const MatrixSource& s, uint8_t* table) {
  for (int32_t code = 0; code < s.points; ++code) {
    for (int32_t i = 0; i < s.p; ++i) {
      const int16_t value = s.table[code * s.p + i];
      if (!is_look(kind_of(s))) {
        table[i * (table_bytes(kind_of(s)) / s.p) + code] = static_cast<uint8_t>(value);
      } else if (s.fine) {
        std::memcpy(table + 4 * code + 2 * i, &value, sizeof value);
      } else {
        table[4 * code + i] = static_cast<uint8_t>(value);
      }
    }
  }
  if (s.kind == PALEY_TABLE2 || s.kind == PALEY_TABLE3) {  // repeated, so that more bits of an index do not matter
    const int period = s.kind == PALEY_TABLE2 ? 4 : 8;
    for (int code = period; code < 16; ++code) table[code] = table[code - period];
  }
}

bool good_values(const MatrixSource& s) {
  static constexpr int32_t most[] = {4, 8, 16, 4, 16, 64, 256, 256, 512, 1024, 4096, 256, 8191};
  if (s.points < 1 || s.points > most[static_cast<int>(s.kind)]) return false;
  const int16_t limit = !s.fine || s.kind == PALEY_BYTES ? 127 : 4095;
  if (s.kind != PALEY_OWN2) {
    for (int64_t i = 0; i < int64_t{s.points} * s.p; ++i) {
      if (s.table[i] < -limit - (s.fine ? 1 : 0) || s.table[i] > limit) return false;
    }
  } else if (std::count(s.own, s.own + int64_t{4} * s.out * (s.columns / s.group), int8_t{-128})) {
    return false;
  }
  if (std::count(s.outlier_values, s.outlier_values + int64_t{s.out} * s.outliers, int8_t{-128})) return false;
  for (int32_t i = 0; i < s.outliers; ++i) {
    const int32_t before = i ? s.outlier_columns[i - 1] : -1;
    if (s.outlier_columns[i] <= before || s.outlier_columns[i] >= s.columns) return false;
  }
  return true;
}

// One row of a group; block: of its first segment. -> false for codes out of range.
bool pack_row(const MatrixSource& s, const InputsLayout& layout, int32_t row, int32_t g, int r, uint8_t* block) {
  const int64_t row_codes = divided_up(s.columns, s.p);
  const int32_t* codes = s.codes + row * row_codes;
  const int32_t of_code = is_plain(kind_of(s)) ? 1 : s.p, in_dword = layout.per / of_code;
  const int64_t bytes = block_bytes(kind_of(s), s.fine != 0);
  for (int32_t from = 0; from < s.group; from += s.segment) {
    const int32_t size = std::min(s.segment, s.group - from);
    for (int32_t c = 0; c < size; c += of_code) {
      const int32_t column = g * s.group + from + c, unit = c / of_code;
      const int32_t code = codes[column / s.p];
      if (code < 0 || code >= s.points) return false;
      const int d = unit / in_dword % BLOCK_DWORDS, i = unit % in_dword;
      uint8_t* at = block + unit / (in_dword * BLOCK_DWORDS) * bytes;
      if (is_plain(kind_of(s))) {
        put_value(kind_of(s), s.fine != 0, at, d, r, i, s.table[code * s.p + column % s.p]);
      } else {
        put_code(kind_of(s), at, d, r, i, static_cast<uint32_t>(code));
      }
    }
    block += blocks_of(size, layout.per) * bytes;
  }
  return true;
}

void pack_outliers(const MatrixSource& s, int32_t row, int r, uint8_t* record) {
  std::memcpy(record + 2 * r, s.outlier_scales + row, sizeof(uint16_t));
  const int per = s.fine ? 2 : 4;
  for (int32_t k = 0; k < s.outliers; ++k) {
    const int d = k / per;
    uint8_t* block = record + 32 + d / BLOCK_DWORDS * block_bytes(PALEY_BYTES, s.fine != 0);
    put_value(PALEY_BYTES, s.fine != 0, block, d % BLOCK_DWORDS, r, k % per, s.outlier_values[int64_t{row} * s.outliers + k]);
  }
}

}  // namespace

Inputs Inputs::in(uint8_t* buffer, const InputsLayout& layout, int64_t tokens) {
  auto* steps = reinterpret_cast<float*>(buffer + tokens * layout.row_bytes);
  return {layout, tokens, buffer, steps, reinterpret_cast<int32_t*>(steps + tokens * layout.segments)};
}

bool Matrix::open(const uint8_t* blob, int64_t bytes, Matrix* matrix) {
  MatrixHeader h;
  if (bytes < int64_t{sizeof h}) return false;
  std::memcpy(&h, blob, sizeof h);
  if (h.magic != MATRIX_MAGIC || h.bytes != bytes || !good_header(h)) return false;
  const Sizes sizes(h);
  if (sizes.bytes != bytes) return false;
  const auto* columns = reinterpret_cast<const int32_t*>(blob + sizeof h + h.table_bytes);
  for (int32_t i = 0; i < h.outliers; ++i) {
    if (columns[i] <= (i ? columns[i - 1] : -1) || columns[i] >= h.columns) return false;
  }
  *matrix = {h.out, static_cast<Kind>(h.kind), sizes.layout, h.fine != 0, h.affine != 0, h.table_scale,
             blob + sizeof h, blob + sizes.start, sizes.group_bytes, sizes.panel_bytes, columns};
  return true;
}

int64_t matrix_bytes(const MatrixSource& source) {
  MatrixHeader h;
  return header_of(source, &h) ? h.bytes : -1;
}

bool pack_matrix(const MatrixSource& s, uint8_t* blob) {
  MatrixHeader h;
  if (!header_of(s, &h) || !good_values(s)) return false;
  const Sizes sizes(h);
  std::memset(blob, 0, h.bytes);
  std::memcpy(blob, &h, sizeof h);
  if (s.kind != PALEY_OWN2 && !is_plain(kind_of(s))) put_table(s, blob + sizeof h);
  if (s.outliers) std::memcpy(blob + sizeof h + h.table_bytes, s.outlier_columns, 4 * int64_t{s.outliers});
  const int32_t groups = s.columns / s.group;
  const int64_t parameters = parameter_bytes(kind_of(s), s.affine != 0);
  for (int32_t row = 0; row < s.out; ++row) {
    const int r = row % PANEL_ROWS;
    uint8_t* record = blob + sizes.start + row / PANEL_ROWS * sizes.panel_bytes;
    for (int32_t g = 0; g < groups; ++g, record += sizes.group_bytes) {
      const int64_t at = int64_t{row} * groups + g;
      std::memcpy(record + 2 * r, s.scales + at, sizeof(uint16_t));
      if (s.affine) record[32 + r] = s.zeros[at];
      if (s.kind == PALEY_OWN2) std::memcpy(record + 32 + 4 * r, s.own + 4 * at, 4);
      if (!pack_row(s, sizes.layout, row, g, r, record + parameters)) return false;
    }
    if (s.outliers) pack_outliers(s, row, r, record);
  }
  return true;
}

void matmul(const Matrix& matrix, const Inputs& inputs, int32_t row_begin, int32_t row_end, float* y, int64_t y_row,
            int32_t level) {
  const MatmulTask task{matrix, inputs, row_begin, row_end, y, y_row};
  switch (level) {
#if PALEY_X86
    case PALEY_AMX: return amx::matmul(task);
    case PALEY_AVX512: return avx512::matmul(task);
    case PALEY_AVX2_VNNI: return avx2_vnni::matmul(task);
    case PALEY_AVX2: return avx2::matmul(task);
#elif defined(__aarch64__)
    case PALEY_NEON: return neon::matmul(task);
#endif
    default: return portable::matmul(task);
  }
}

}  // namespace paley
