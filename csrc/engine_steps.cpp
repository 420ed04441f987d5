#include <algorithm>
#include <cstring>

#include "engine.h"
#include "planes_half.h"

namespace paley {

void Engine::round(const paley_rounding& how, const float* x, int64_t tokens, const float* diagonal, float* values,
                   uint8_t* codes, float* scales, uint8_t* zeros) const {
  round_(RoundingTask{how, x, tokens, diagonal, 1, values, codes, scales, zeros});
}

void Engine::read(const std::vector<Part>& parts, const float* const* tables, int64_t positions, float* logits) {
  (void)positions;
  parts_ = &parts;
  tables_ = tables;
  tokens_.clear();
  bool wanted = false;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& part = parts[p];
    for (int64_t t = 0; t < part.tokens; ++t) {
      tokens_.push_back({static_cast<int32_t>(p), part.context->length() + t, part.ids[t]});
    }
    part.context->make_room(part.context->length() + part.tokens);
    wanted |= part.wanted;
  }
  rows_ = static_cast<int64_t>(tokens_.size());
  for (size_t b = 0; b < buffers_.size(); ++b) {
    const size_t size = static_cast<size_t>(rows_) * widths_[b];
    if (buffers_[b].size() < size && b != static_cast<size_t>(wires_[logits_].buffer)) buffers_[b].resize(size);
  }
  buffers_[wires_[logits_].buffer].resize(parts.size() * static_cast<size_t>(widths_[wires_[logits_].buffer]));
  for (const paley_step& step : program_) {
    if (step.kind == PALEY_STEP_LAST && !wanted) break;
    run(step);
  }
  if (wanted) {
    for (int64_t row = 0; row < rows_; ++row) {
      std::copy_n(wire(logits_, row), vocabulary, logits + row * vocabulary);
    }
  }
  for (const Part& part : parts) part.context->settle(part.context->length() + part.tokens, part.keep);
}

void Engine::run(const paley_step& step) {
  const int32_t in = step.in;
  switch (step.kind) {
    case PALEY_STEP_EMBED: return embed(step);
    case PALEY_STEP_INPUT: return encode(inputs_[step.index], step.index);
    case PALEY_STEP_MULTIPLY: return multiply(step);
    case PALEY_STEP_ATTEND: return attend(step);
    case PALEY_STEP_TURN: return turn(step);
    case PALEY_STEP_LAST: return last(step);
    case PALEY_STEP_NORM:
      return for_rows(rows_, wires_[in].width, [&](int64_t begin, int64_t end, Scratch&) {
        for (int64_t row = begin; row < end; ++row) {
          steps_.norm(wire(in, row), step.size, wires_[in].width / step.size, step.vector, step.size, step.value,
                      wire(step.out, row), step.size, step.flag != 0);
        }
      });
    case PALEY_STEP_ROTATE:
      return for_rows(rows_, wires_[in].width, [&](int64_t begin, int64_t end, Scratch&) {
        for (int64_t row = begin; row < end; ++row) {
          const float* table = tables_[step.index] + tokens_[row].at * ((step.count + LANES - 1) / LANES * LANES);
          steps_.rotate(wire(in, row), wires_[in].width / step.size, step.size, table, step.count,
                        step.flag != 0);
        }
      });
    case PALEY_STEP_GATE:
      return for_rows(rows_, 4 * wires_[in].width, [&](int64_t begin, int64_t end, Scratch&) {
        for (int64_t row = begin; row < end; ++row) {
          steps_.gate(wire(in, row), wire(step.other, row), wires_[in].width, step.index, wire(step.out, row));
        }
      });
    case PALEY_STEP_CAP:
      return for_rows(rows_, 4 * wires_[in].width, [&](int64_t begin, int64_t end, Scratch&) {
        for (int64_t row = begin; row < end; ++row) steps_.cap(wire(in, row), wires_[in].width, step.value);
      });
    case PALEY_STEP_SCALE:
      return for_rows(rows_, wires_[in].width, [&](int64_t begin, int64_t end, Scratch&) {
        for (int64_t row = begin; row < end; ++row) {
          float* x = wire(in, row);
          for (int32_t i = 0; i < wires_[in].width; ++i) x[i] *= step.value;
        }
      });
  }
}

void Engine::embed(const paley_step& step) {
  const paley_embedding& e = embeddings_[step.index];
  for_rows(rows_, 20 * e.width, [&](int64_t begin, int64_t end, Scratch& own) {
    for (int64_t row = begin; row < end; ++row) embed_row(e, tokens_[row].id, wire(step.out, row), own);
  });
}

void Engine::embed_row(const paley_embedding& e, int32_t id, float* to, Scratch& own) const {
  own.rows.resize(2 * static_cast<size_t>(e.width) + 8 * static_cast<size_t>(std::max(e.p, 1)) + 64);
  float* row = own.rows.data();
  const uint8_t* stored = static_cast<const uint8_t*>(e.weight) + id * e.row_bytes;
  if (e.stored == PALEY_FLOAT32) {
    std::memcpy(row, stored, sizeof(float) * e.width);
  } else if (e.stored != PALEY_CODES) {
    for (int32_t i = 0; i < e.width; ++i) {
      uint16_t half;
      std::memcpy(&half, stored + 2 * i, sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      if (e.stored == PALEY_FLOAT16) {
        row[i] = half_to_float(half);
      } else {
        std::memcpy(row + i, &bits, sizeof bits);
      }
    }
  } else {
    const int32_t group = e.width / e.groups;
    int64_t bit = 0;
    for (int32_t i = 0; i < e.width; bit += e.symbol_bits) {
      uint64_t symbol = 0;  // at most 48 bits, which begin anywhere in a byte
      const int64_t first = bit / 8, bytes = std::min<int64_t>(8, e.row_bytes - first);
      std::memcpy(&symbol, stored + first, bytes);
      symbol = symbol >> (bit % 8) & ((uint64_t{1} << e.symbol_bits) - 1);
      for (int32_t k = 0; k < e.symbol_codes && i < e.width; ++k, symbol /= e.n) {
        const float* point = e.points + symbol % e.n * e.p;
        for (int32_t j = 0; j < e.p && i < e.width; ++j, ++i) {
          const int64_t at = int64_t{id} * e.groups + i / group;
          row[i] = (point[j] - (e.zeros ? e.zeros[at] : 0.0f)) * half_to_float(e.scales[at]);
        }
      }
    }
  }
  int32_t width = e.width;
  float* other = row + e.width + 8;
  if (e.back) {
    round(*e.back, row, 1, nullptr, other);
    width = e.back->in_dim;
    std::swap(row, other);
  }
  if (e.factor != 1.0f) {
    for (int32_t i = 0; i < width; ++i) row[i] *= e.factor;
  }
  if (e.stream) {
    round(*e.stream, row, 1, nullptr, to);
  } else {
    std::copy_n(row, width, to);
  }
}

void Engine::encode(const paley_input& input, int32_t index) {
  if (input.integers) return encode_integers(index);
  if (!input.how) return;  // linears read the wire itself
  const size_t size = static_cast<size_t>(rows_) * input.width;
  if (encoded_[index].size() < size) encoded_[index].resize(size);
  for_rows(rows_, 20 * input.width, [&](int64_t begin, int64_t end, Scratch& own) {
    for (int64_t row = begin; row < end; ++row) {
      encode_row(input, wire(input.wire, row), encoded_[index].data() + row * input.width, own);
    }
  });
}

void Engine::encode_integers(int32_t index) {
  const paley_input& input = inputs_[index];
  const size_t size = static_cast<size_t>(layouts_[index].bytes(rows_)) + 63;
  if (integers_[index].size() < size) integers_[index].resize(size);
  const Inputs inputs = integers(index);
  for_rows(rows_, 20 * input.width, [&](int64_t begin, int64_t end, Scratch&) {
    encode_inputs(*input.integers, wire(input.wire, begin), begin, end - begin, inputs);
  });
}

Inputs Engine::integers(int32_t index) {
  auto at = reinterpret_cast<uintptr_t>(integers_[index].data());
  return Inputs::in(reinterpret_cast<uint8_t*>((at + 63) / 64 * 64), layouts_[index], rows_);
}

void Engine::encode_row(const paley_input& input, const float* x, float* to, Scratch& own) const {
  if (!input.outliers) return round(*input.how, x, 1, input.diagonal, to);
  own.rows.resize(static_cast<size_t>(input.width) + 2 * static_cast<size_t>(input.outliers));
  float *turned = own.rows.data(), *apart = turned + input.width, *rounded = apart + input.outliers;
  if (input.turn) {
    round(*input.turn, x, 1, input.diagonal, turned);
  } else {
    std::copy_n(x, input.width, turned);
  }
  for (int32_t k = 0; k < input.outliers; ++k) {
    apart[k] = turned[input.columns[k]];
    turned[input.columns[k]] = 0.0f;
  }
  round(*input.own, apart, 1, nullptr, rounded);
  round(*input.how, turned, 1, nullptr, to);
  for (int32_t k = 0; k < input.outliers; ++k) to[input.columns[k]] = rounded[k];
}

void Engine::multiply(const paley_step& step) {
  constexpr int64_t WORTH = 100000;  // products of a thread that are worth waking it
  struct Piece {
    int32_t linear;
    int64_t begin, end;
  };
  int64_t work = 0, room = 0;
  for (int32_t i = step.index; i < step.index + step.count; ++i) {
    work += linears_[i].rows * linears_[i].columns;
    products_at_[i] = room;
    room += linears_[i].stored == PALEY_MATRIX && linears_[i].adds ? linears_[i].rows * rows_ : 0;
  }
  if (static_cast<int64_t>(products_.size()) < room) products_.resize(room);
  const int64_t parts = std::clamp<int64_t>(work * rows_ / WORTH, 1, 8 * threads);
  std::vector<Piece> pieces;
  for (int32_t i = step.index; i < step.index + step.count; ++i) {
    const paley_linear& linear = linears_[i];
    const int64_t share = (work / parts / linear.columns + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS;
    const int64_t rows = parts == 1 ? linear.rows : std::max<int64_t>(2 * PANEL_ROWS, share);
    for (int64_t begin = 0; begin < linear.rows; begin += rows) {
      pieces.push_back({i, begin, std::min(linear.rows, begin + rows)});
    }
  }
  const auto piece = [&](int64_t item, int) {
    multiply_rows(pieces[item].linear, pieces[item].begin, pieces[item].end);
  };
  if (parts == 1) {
    for (size_t item = 0; item < pieces.size(); ++item) piece(static_cast<int64_t>(item), 0);
  } else {
    pool_.run(static_cast<int64_t>(pieces.size()), piece);
  }
}

void Engine::multiply_rows(int32_t index, int64_t begin, int64_t end) {
  const paley_linear& linear = linears_[index];
  const paley_input& input = inputs_[linear.input];
  if (linear.stored != PALEY_MATRIX) {
    const float* x = input.how ? encoded_[linear.input].data() : wire(input.wire, 0);
    const int64_t x_stride = input.how ? input.width : stride(input.wire);
    return steps_.plain({linear.stored, linear.weight, linear.columns, begin, end, x, x_stride, rows_, linear.bias,
                         wire(linear.wire, 0), stride(linear.wire), linear.adds != 0, linear.factor});
  }
  float* y = linear.adds ? products_.data() + products_at_[index] : wire(linear.wire, 0);
  const int64_t y_stride = linear.adds ? linear.rows : stride(linear.wire);
  matmul(matrices_[index], integers(linear.input), static_cast<int32_t>(begin), static_cast<int32_t>(end), y, y_stride,
         matmul_level_);
  if (!linear.adds && !linear.bias && linear.factor == 1.0f) return;
  for (int64_t row = 0; row < rows_; ++row) {
    const float* from = y + row * y_stride;
    float* to = wire(linear.wire, row);
    for (int64_t i = begin; i < end; ++i) {
      const float value = linear.factor * (linear.bias ? from[i] + linear.bias[i] : from[i]);
      to[i] = linear.adds ? to[i] + value : value;
    }
  }
}

void Engine::turn(const paley_step& step) {
  for_rows(rows_, 20 * wires_[step.in].width, [&](int64_t begin, int64_t end, Scratch&) {
    for (int64_t row = begin; row < end; ++row) {
      float* to = wire(step.out, row);
      round(*step.how, wire(step.in, row), 1, nullptr, to);
      for (int32_t i = 0; i < wires_[step.out].width; ++i) to[i] *= step.value;
    }
  });
}

void Engine::last(const paley_step& step) {
  int64_t row = -1, kept = 0;
  for (const Part& part : *parts_) {
    row += part.tokens;
    if (part.wanted) std::copy_n(wire(step.in, row), wires_[step.in].width, wire(step.out, kept++));
  }
  rows_ = kept;
}

}  // namespace paley
