#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "matmul.h"
#include "matmul_layout.h"
#include "matmul_numbers.h"
#include "rounding.h"

namespace paley {
namespace {

constexpr int64_t PIECE = 16;  // tokens transformed at a time

const InputNumbers& numbers() {  // results are the same
#if PALEY_X86
  static const int32_t levels = paley_matmul_levels();  // asking the processor takes a while
  if (levels >> PALEY_AVX512 & 1) return INPUTS_AVX512;
  if (levels >> PALEY_AVX2 & 1) return INPUTS_AVX2;
#endif
  return INPUTS_PORTABLE;
}

// Codes of a token, written segment by segment; three of them in four bytes if per is 3.
class Writer {
 public:
  Writer(const InputsHow& how, const Inputs& inputs)
      : how_(how), in_(inputs), layout_(inputs.layout), numbers_(numbers()) {
    const int32_t width = std::max(layout_.segment, layout_.outliers);
    if (layout_.per == 3) apart_.reset(new int8_t[width]);
    outliers_.reset(new float[layout_.outliers + 1]);
  }

  // values [columns] of a token.
  void values(int64_t token, const float* values) {
    begin(token);
    each_segment([&](int32_t column, int32_t size) {
      const float most = numbers_.greatest(values + column, size);
      if (layout_.per == 2) {
        segment<int16_t>(values + column, size, most, 4095.0f);
      } else {
        segment<int8_t>(values + column, size, most, 127.0f);
      }
    });
  }

  // Codes of a scheme, [columns], of groups with scales and zeros.
  void codes(int64_t token, const uint8_t* codes, int32_t group, const float* scales, const uint8_t* zeros) {
    begin(token);
    const int32_t *outlier = how_.outlier_columns, *end = outlier ? outlier + layout_.outliers : nullptr;
    each_segment([&](int32_t column, int32_t size) {
      const int32_t g = column / group, zero = zeros ? zeros[g] : 0;
      const float step = scales[g] * how_.map_scale;
      if (layout_.per == 2) {
        write<int16_t>(size, step, [&](int16_t* to) { return mapped(codes + column, size, zero, to); });
      } else {
        write<int8_t>(size, step, [&](int8_t* to) { return mapped(codes + column, size, zero, to); });
      }
      for (; outlier != end && *outlier < column + size; ++outlier) {  // a grid need not have a point at 0
        sum_[-1] -= how_.map[codes[*outlier]] - zero;
        std::memset(at_ + (*outlier - column) * (layout_.per == 2 ? 2 : 1), 0, layout_.per == 2 ? 2 : 1);
      }
    });
  }

  // Takes the outliers out of a token's values [columns], or only looks at them.
  void take_outliers(float* values) {
    for (int32_t k = 0; k < layout_.outliers; ++k) {
      float& value = values[how_.outlier_columns[k]];
      outliers_[k] = value, value = 0.0f;
    }
  }

  // After values or codes. They are rounded as core/rounding.py does: int8, the greatest value becomes 127.
  void outliers() {
    const int32_t size = layout_.outliers;
    if (!size) return;
    const float most = numbers_.greatest(outliers_.get(), size);
    float scale = most * static_cast<float>(1.0 / 127.0);
    scale = scale < FLT_MIN ? FLT_MIN : scale;
    // Here four bytes hold four codes, also if per is 3.
    if (layout_.per == 2) {
      *sum_++ = numbers_.divided_words(outliers_.get(), size, scale, 127.0f, reinterpret_cast<int16_t*>(at_));
    } else {
      *sum_++ = numbers_.divided_bytes(outliers_.get(), size, scale, 127.0f, reinterpret_cast<int8_t*>(at_));
    }
    *step_++ = scale;
  }

 private:
  void begin(int64_t token) {
    at_ = in_.codes + token * layout_.row_bytes;
    step_ = in_.steps + token * layout_.segments;
    sum_ = in_.sums + token * layout_.segments;
    std::memset(at_, 0, layout_.row_bytes);
  }

  template <class Segment>
  void each_segment(const Segment& segment) {
    for (int32_t group = 0; group < layout_.columns; group += layout_.group) {
      for (int32_t from = 0; from < layout_.group; from += layout_.segment) {
        const int32_t size = std::min(layout_.segment, layout_.group - from);
        segment(group + from, size);
        at_ += 32 * blocks_of(size, layout_.per);
      }
    }
  }

  template <class Code>
  void segment(const float* x, int32_t size, float most, float limit) {
    const bool some = most > 1e-30f;  // else 0; NaN stays
    const float factor = some ? limit / most : 0.0f;
    write<Code>(size, some || most != most ? most / limit : 0.0f,
                [&](Code* to) {
                  if constexpr (sizeof(Code) == 2) return numbers_.words(x, size, factor, limit, to);
                  else return numbers_.bytes(x, size, factor, limit, to);
                });
  }

  template <class Code, class Make>
  void write(int32_t size, float step, const Make& make) {
    if (layout_.per != 3) {
      *sum_++ = make(reinterpret_cast<Code*>(at_));
    } else {
      auto* apart = reinterpret_cast<Code*>(apart_.get());
      *sum_++ = make(apart);
      for (int32_t i = 0; i < size; ++i) at_[i / 3 * 4 + i % 3] = static_cast<uint8_t>(apart[i]);
    }
    *step_++ = step;
  }

  template <class Code>
  int32_t mapped(const uint8_t* codes, int32_t size, int32_t zero, Code* to) const {
    int32_t sum = 0;
    for (int32_t i = 0; i < size; ++i) {
      const int32_t code = how_.map[codes[i]] - zero;
      to[i] = static_cast<Code>(code);
      sum += code;
    }
    return sum;
  }

  const InputsHow& how_;
  const Inputs& in_;
  const InputsLayout& layout_;
  const InputNumbers& numbers_;
  std::unique_ptr<int8_t[]> apart_;
  std::unique_ptr<float[]> outliers_;
  uint8_t* at_ = nullptr;
  float* step_ = nullptr;
  int32_t* sum_ = nullptr;
};

void round(const paley_rounding& how, const float* x, int64_t tokens, const float* diagonal, float* values,
           uint8_t* codes, float* scales, uint8_t* zeros) {
  const RoundingTask task{how, x, tokens, diagonal, 1, values, codes, scales, zeros};
  switch (paley_best_level()) {  // results are the same
#if PALEY_X86
    case PALEY_AVX512: return avx512::round(task);
    case PALEY_AVX2: return avx2::round(task);
#endif
    default: return portable::round(task);
  }
}

}  // namespace

void encode_inputs(const InputsHow& how, const float* x, int64_t first, int64_t count, const Inputs& inputs) {
  const int64_t columns = inputs.layout.columns;
  Writer writer(how, inputs);
  const bool outliers = inputs.layout.outliers > 0;
  if (!how.rounding) {
    std::vector<float> row(outliers ? columns : 0);
    for (int64_t t = 0; t < count; ++t) {
      const float* values = x + t * columns;
      if (outliers) {
        std::copy_n(values, columns, row.begin());
        writer.take_outliers(row.data());
        values = row.data();
      }
      writer.values(first + t, values);
      writer.outliers();
    }
    return;
  }
  const paley_rounding& rounding = *how.rounding;
  paley_rounding turn = rounding, rest = rounding;  // outliers are taken between them
  turn.table = nullptr;
  rest.in_dim = rest.out_dim, rest.dense = nullptr, rest.signs = nullptr;
  const int32_t group = rounding.table ? rounding.group_size : 1;
  const int64_t groups = columns / group;
  std::vector<float> values(PIECE * columns), scales(how.map ? PIECE * groups : 0);
  std::vector<uint8_t> codes(how.map ? PIECE * columns : 0), zeros(how.map && rounding.affine ? PIECE * groups : 0);
  for (int64_t from = 0; from < count; from += PIECE) {
    const int64_t tokens = std::min(PIECE, count - from);
    const float* source = x + from * rounding.in_dim;
    const bool twice = outliers && rounding.table;
    for (int64_t t = 0; t < (outliers ? tokens : 1); ++t) {  // outliers are kept of one token at a time
      const int64_t now = outliers ? 1 : tokens;
      const float *from_x = source + t * rounding.in_dim, *diagonal = how.diagonal;
      if (outliers) {
        round(turn, from_x, 1, diagonal, values.data(), nullptr, nullptr, nullptr);
        writer.take_outliers(values.data());
        from_x = values.data(), diagonal = nullptr;
      }
      const paley_rounding& last = outliers ? rest : rounding;
      if (how.map) {
        round(last, from_x, now, diagonal, nullptr, codes.data(), scales.data(), zeros.data());
      } else if (!outliers || twice) {
        round(last, from_x, now, diagonal, values.data(), nullptr, nullptr, nullptr);
      }
      for (int64_t i = 0; i < now; ++i) {
        const int64_t token = first + from + t + i;
        if (how.map) {
          writer.codes(token, codes.data() + i * columns, group, scales.data() + i * groups,
                       rounding.affine ? zeros.data() + i * groups : nullptr);
        } else {
          writer.values(token, values.data() + i * columns);
        }
        writer.outliers();
      }
    }
  }
}

}  // namespace paley
