// A prepared matrix is made of codes, of one integer each or packed as in a file.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <vector>

#include "matmul.h"
#include "matmul_sizes.h"
#include "parallel.h"

namespace paley {
namespace {

Kind kind_of(const MatrixSource& s) { return static_cast<Kind>(s.kind); }

bool header_of(const MatrixSource& s, MatrixHeader* h) {
  if (s.kind < 0 || s.kind >= PALEY_KINDS || s.p < 1 || s.p > 8) return false;
  const bool look = is_look(kind_of(s));
  const int32_t per = s.fine ? 2 : look ? s.p : 4;
  *h = {MATRIX_MAGIC, s.out, s.columns, s.group, s.segment, s.kind, s.fine, per, s.affine,
        s.outliers, s.table_scale, static_cast<int32_t>(table_bytes(kind_of(s))), 0, {}};
  if (!good_header(*h)) return false;
  const bool pairs = s.kind >= PALEY_PAIRS4 && s.kind <= PALEY_PAIRS8;
  const int32_t wanted = is_trellis(kind_of(s)) ? trellis_p(kind_of(s)) : pairs ? 2 : look ? per : 1;
  if (!is_plain(kind_of(s)) && s.p != wanted) return false;
  // A code does not run across segments.
  if (!is_plain(kind_of(s)) && (s.group % s.p || (s.segment != s.group && s.segment % s.p))) return false;
  h->bytes = Sizes(*h).bytes;
  return true;
}

// Code positions of a block: for dword d of row r, value or code i.
PALEY_INLINE void put_bits(uint8_t* at, int shift, uint32_t code) { *at = static_cast<uint8_t>(*at | code << shift); }

template <Kind KIND>
PALEY_INLINE void put_code(uint8_t* block, int d, int r, int i, uint32_t code) {
  const int step = d / 2, odd = d % 2, single = r * 4 + i;
  const int pair = r / 4 * 16 + odd * 8 + r % 4 * 2 + i;
  switch (KIND) {
    case PALEY_TABLE4: return put_bits(block + step * 64 + single, 4 * odd, code);
    case PALEY_TABLE2:
    case PALEY_OWN2: return put_bits(block + step / 2 * 64 + single, 4 * (step % 2) + 2 * odd, code);
    case PALEY_TABLE3:
      put_bits(block + step / 2 * 64 + single, 4 * (step % 2) + 2 * odd, code & 3);
      return put_bits(block + 128 + single, d, code >> 2);
    case PALEY_TABLE6:
      put_bits(block + step * 64 + single, 4 * odd, code & 15);
      return put_bits(block + 256 + step / 2 * 64 + single, d % 4 * 2, code >> 4);
    case PALEY_PAIRS4: return put_bits(block + step / 2 * 64 + pair, 4 * (step % 2), code);
    case PALEY_PAIRS6:
      put_bits(block + step / 2 * 64 + pair, 4 * (step % 2), code & 15);
      return put_bits(block + 128 + pair, 2 * step, code >> 4);
    case PALEY_PAIRS8: block[step * 64 + pair] = static_cast<uint8_t>(code); return;
    default: {
      constexpr int high = look_high(KIND);
      block[d * 16 + r] = static_cast<uint8_t>(code);
      if (high) put_bits(block + 128 + d * high / 8 * 16 + r, d * high % 8, code >> 8);
    }
  }
}

PALEY_INLINE void put_value(Kind kind, bool fine, uint8_t* block, int d, int r, int i, int16_t value) {
  if (kind == PALEY_WORDS) {
    std::memcpy(block + d * 64 + r * 4 + 2 * i, &value, sizeof value);
  } else {
    block[fine ? d * 32 + r * 2 + i : d * 64 + r * 4 + i] = static_cast<uint8_t>(value);
  }
}

// The table as a kind reads it.
void put_table(const MatrixSource& s, uint8_t* table) {
  if (is_trellis(kind_of(s))) {
    for (int64_t i = 0; i < table_bytes(kind_of(s)); ++i) table[i] = static_cast<uint8_t>(s.table[i]);
    return;
  }
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
  static constexpr int32_t most[] = {4, 8, 16, 4, 16, 64, 256, 256, 512, 1024, 4096, 1 << 20, 1 << 20,
                                     2, 8, 4, 32, 8, 128, 16, 32, 64, 64};
  static_assert(std::size(most) == PALEY_KINDS);
  if (s.points < 1 || s.points > most[static_cast<int>(s.kind)]) return false;
  if (is_trellis(kind_of(s))) {
    const auto inside = [](int16_t low, int16_t high) { return [=](int16_t x) { return x >= low && x <= high; }; };
    return std::all_of(s.table, s.table + 256, inside(0, 255)) &&
           std::all_of(s.table + 256, s.table + 384, inside(-127, 127)) && s.outliers == 0;
  }
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

// Where codes come from: int32 [out, codes of a row], or rows of packed symbols.
class Rows {
 public:
  Rows(const MatrixSource& s, const PackedCodes* packed)
      : source_(s), packed_(packed), count_(divided_up(s.columns, s.p)), codes_(packed ? count_ : 0) {
    if (packed) padded_.resize(packed->row_bytes + 8);
  }

  // -> the codes of a row, all of them below points; null for others.
  const int32_t* read(int32_t row) {
    if (!packed_) {
      const int32_t* codes = source_.codes + row * count_;
      const auto bad = [this](int32_t code) { return code < 0 || code >= source_.points; };
      return std::any_of(codes, codes + count_, bad) ? nullptr : codes;
    }
    std::memcpy(padded_.data(), packed_->bytes + row * packed_->row_bytes, packed_->row_bytes);
    return unpack() ? codes_.data() : nullptr;
  }

 private:
  bool unpack() {
    const int bits = packed_->symbol_bits, per = packed_->per_symbol;
    const uint64_t mask = (uint64_t{1} << bits) - 1, size = packed_->size;
    const uint64_t most = static_cast<uint64_t>(source_.points);
    uint64_t word, largest = 0;
    for (int64_t i = 0, bit = 0; i < count_; bit += bits) {
      std::memcpy(&word, padded_.data() + bit / 8, sizeof word);
      word = word >> bit % 8 & mask;
      if (per == 1) {
        largest = std::max(largest, word);
        codes_[i++] = static_cast<int32_t>(word);
        continue;
      }
      for (int k = 0; k < per; ++k, word /= size) {
        if (i < count_) codes_[i++] = static_cast<int32_t>(word % size);
      }
      if (word) return false;  // more than so many codes can give
    }
    return largest < most;
  }

  const MatrixSource& source_;
  const PackedCodes* packed_;
  int64_t count_;
  std::vector<int32_t> codes_;
  std::vector<uint8_t> padded_;
};

// The codes of a row's group; block: of its first segment.
template <Kind KIND>
void pack_codes(const MatrixSource& s, const InputsLayout& layout, const int32_t* codes, int32_t g, int r,
                uint8_t* block) {
  constexpr int64_t bytes = block_bytes(KIND, false);
  const int32_t in_dword = layout.per / s.p;
  codes += g * (s.group / s.p);
  for (int32_t from = 0; from < s.group; from += s.segment) {
    const int32_t size = std::min(s.segment, s.group - from);
    int32_t units = size / s.p;
    for (; units > 0; block += bytes) {
      for (int d = 0; d < BLOCK_DWORDS && units > 0; ++d) {
        const int32_t here = std::min(in_dword, units);
        for (int32_t i = 0; i < here; ++i) put_code<KIND>(block, d, r, i, static_cast<uint32_t>(*codes++));
        units -= here;
      }
    }
  }
}

// See matmul_trellis.h. What is before the first code of a row is its last: a row is a ring.
void pack_trellis(const MatrixSource& s, const InputsLayout&, const int32_t* codes, int32_t g, int r, uint8_t* block) {
  const Kind kind = kind_of(s);
  const bool fine = s.fine != 0;
  const int bits = trellis_bits(kind), words = trellis_words(kind, fine), p = trellis_p(kind);
  const int32_t of_row = s.columns / p, of_block = trellis_columns(fine) / p, first = g * (s.group / p);
  const auto put = [&](uint8_t* at, uint64_t stream, bool dword) {
    dword ? std::memcpy(at + 4 * r, &stream, 4) : std::memcpy(at + 2 * r, &stream, 2);
  };
  uint64_t before = 0;
  for (int at = 0; at < 32; at += bits) {
    before |= static_cast<uint64_t>(codes[(first - 1 - at / bits + of_row) % of_row]) << at;
  }
  put(block - trellis_before(kind, fine), before, words % 2 == 0);
  for (int32_t i = first; i < first + s.group / p; i += of_block, block += 32 * words) {
    uint64_t stream = 0;
    int count = 0, plane = 0;
    for (int32_t k = 0; k < of_block; ++k) {
      stream = stream << bits | static_cast<uint64_t>(codes[i + k]), count += bits;
      if (count >= 32) put(block + 64 * plane++, stream >> (count -= 32), true);
    }
    if (count) put(block + 64 * plane, stream, false);
  }
}

void pack_values(const MatrixSource& s, const InputsLayout& layout, const int32_t* codes, int32_t g, int r,
                 uint8_t* block) {
  const int64_t bytes = block_bytes(kind_of(s), s.fine != 0);
  int32_t column = g * s.group, code = column / s.p, part = column % s.p;
  for (int32_t from = 0; from < s.group; from += s.segment) {
    for (int32_t left = std::min(s.segment, s.group - from); left > 0; block += bytes) {
      for (int d = 0; d < BLOCK_DWORDS && left > 0; ++d) {
        for (int32_t i = 0; i < layout.per && left > 0; ++i, --left) {
          put_value(kind_of(s), s.fine != 0, block, d, r, i, s.table[codes[code] * s.p + part]);
          if (++part == s.p) ++code, part = 0;
        }
      }
    }
  }
}

using PackGroup = void (*)(const MatrixSource&, const InputsLayout&, const int32_t*, int32_t, int, uint8_t*);
PackGroup packer(Kind kind) {
  switch (kind) {
    case PALEY_TABLE2: return pack_codes<PALEY_TABLE2>;
    case PALEY_TABLE3: return pack_codes<PALEY_TABLE3>;
    case PALEY_TABLE4: return pack_codes<PALEY_TABLE4>;
    case PALEY_TABLE6: return pack_codes<PALEY_TABLE6>;
    case PALEY_OWN2: return pack_codes<PALEY_OWN2>;
    case PALEY_PAIRS4: return pack_codes<PALEY_PAIRS4>;
    case PALEY_PAIRS6: return pack_codes<PALEY_PAIRS6>;
    case PALEY_PAIRS8: return pack_codes<PALEY_PAIRS8>;
    case PALEY_LOOK8: return pack_codes<PALEY_LOOK8>;
    case PALEY_LOOK9: return pack_codes<PALEY_LOOK9>;
    case PALEY_LOOK10: return pack_codes<PALEY_LOOK10>;
    case PALEY_LOOK12: return pack_codes<PALEY_LOOK12>;
    default: return is_trellis(kind) ? pack_trellis : pack_values;
  }
}

void pack_outliers(const MatrixSource& s, int32_t row, int r, uint8_t* record) {
  std::memcpy(record + 2 * r, s.outlier_scales + row, sizeof(uint16_t));
  const int per = s.fine ? 2 : 4;
  for (int32_t k = 0; k < s.outliers; ++k) {
    const int d = k / per;
    uint8_t* block = record + 32 + d / BLOCK_DWORDS * block_bytes(PALEY_BYTES, s.fine != 0);
    const int8_t value = s.outlier_values[int64_t{row} * s.outliers + k];
    put_value(PALEY_BYTES, s.fine != 0, block, d % BLOCK_DWORDS, r, k % per, value);
  }
}

bool good_packed(const MatrixSource& s, const PackedCodes& c) {
  if (!c.bytes || c.per_symbol < 1 || c.per_symbol > 8 || c.size < 2) return false;
  if (c.symbol_bits < 1 || c.symbol_bits > 48) return false;
  const int64_t codes = divided_up(s.columns, s.p), symbols = divided_up(codes, c.per_symbol);
  return c.row_bytes == divided_up(symbols * c.symbol_bits, 8) && (c.per_symbol == 1 || c.size <= s.points);
}

// 16 rows. -> false for codes out of range.
bool pack_panel(const MatrixSource& s, const Sizes& sizes, PackGroup pack_group, Rows& rows, int32_t first,
                uint8_t* panel) {
  const int32_t groups = s.columns / s.group;
  const int64_t parameters = parameter_bytes(kind_of(s), s.fine != 0, s.affine != 0);
  std::memset(panel, 0, sizes.panel_bytes);
  for (int32_t row = first; row < std::min(first + PANEL_ROWS, s.out); ++row) {
    const int r = row % PANEL_ROWS;
    const int32_t* codes = rows.read(row);
    if (!codes) return false;
    uint8_t* record = panel;
    for (int32_t g = 0; g < groups; ++g, record += sizes.group_bytes) {
      const int64_t at = int64_t{row} * groups + g;
      std::memcpy(record + 2 * r, s.scales + at, sizeof(uint16_t));
      if (s.affine) record[32 + r] = s.zeros[at];
      if (s.kind == PALEY_OWN2) std::memcpy(record + 32 + 4 * r, s.own + 4 * at, 4);
      pack_group(s, sizes.layout, codes, g, r, record + parameters);
    }
    if (s.outliers) pack_outliers(s, row, r, record);
  }
  return true;
}

}  // namespace

int64_t matrix_bytes(const MatrixSource& source) {
  MatrixHeader h;
  return header_of(source, &h) ? h.bytes : -1;
}

bool pack_matrix(const MatrixSource& s, const PackedCodes* packed, int threads, uint8_t* blob) {
  MatrixHeader h;
  if (!header_of(s, &h) || !good_values(s) || (packed ? !good_packed(s, *packed) : !s.codes)) return false;
  const Sizes sizes(h);
  std::memset(blob, 0, sizes.start);
  std::memcpy(blob, &h, sizeof h);
  if (s.kind != PALEY_OWN2 && !is_plain(kind_of(s))) put_table(s, blob + sizeof h);
  if (s.outliers) std::memcpy(blob + sizeof h + h.table_bytes, s.outlier_columns, 4 * int64_t{s.outliers});
  const PackGroup pack_group = packer(kind_of(s));
  std::atomic<int32_t> next{0};
  std::atomic<bool> good{true};
  run_workers(threads, [&] {
    Rows rows(s, packed);
    for (int32_t row; (row = next.fetch_add(PANEL_ROWS)) < s.out && good;) {
      uint8_t* panel = blob + sizes.start + row / PANEL_ROWS * sizes.panel_bytes;
      if (!pack_panel(s, sizes, pack_group, rows, row, panel)) good = false;
    }
  });
  return good;
}

}  // namespace paley
