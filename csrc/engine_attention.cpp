// The attention step of the engine: what is put into the cache, and who looks at what.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace paley {

namespace {

int64_t width_of_base(const paley_attention& how) {
  return how.base == PALEY_TURNED_BASE ? (how.table_width + LANES - 1) / LANES * LANES : 0;
}

}  // namespace

void Engine::attend(const paley_step& step) {
  const Attention& a = attentions_[step.index];
  const paley_attention& how = a.how;
  const int64_t base_width = width_of_base(how);
  const auto grown = [](std::vector<float>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(size);
  };
  grown(queries_, rows_ * how.heads * a.keys.padded);
  grown(bases_, rows_ * how.heads * base_width);
  grown(firsts_, rows_ * how.heads);
  const float* table = how.table >= 0 ? tables_[how.table] : nullptr;
  for_rows(rows_, 20 * (how.heads + 2 * how.kv_heads) * how.size, [&](int64_t begin, int64_t end, Scratch& own) {
    for (int64_t row = begin; row < end; ++row) {
      put_row(a, tokens_[row], wire(how.keys, row), wire(how.values, row), table, own);
      query_row(a, row, table, own);
    }
  });
  look(a, table);
}

void Engine::put_row(const Attention& a, const Row& row, const float* k, const float* v, const float* table,
                     Scratch& own) {
  const paley_attention& how = a.how;
  Context& context = *(*parts_)[row.part].context;
  Page& page = context.layers_[how.layer][row.at / PAGE];
  const int64_t place = row.at % PAGE;
  const int64_t wide = std::max({a.keys.width, a.values.width, how.size});
  own.rows.resize(static_cast<size_t>(3 * how.kv_heads * wide));
  float* keys = own.rows.data();
  if (how.base != PALEY_NO_BASE) {
    float *base = keys + how.kv_heads * wide, *plain = base + how.kv_heads * wide;
    const int64_t size = int64_t{how.kv_heads} * how.size, width = int64_t{how.kv_heads} * a.keys.width;
    if (how.turn) {
      round(*how.turn, k, how.kv_heads, nullptr, keys);
    } else {
      std::copy_n(k, size, keys);
    }
    const float* less = how.offsets;
    if (how.base == PALEY_TURNED_BASE) {
      std::copy_n(how.offsets + (row.at ? size : 0), size, plain);
      steps_.rotate(plain, how.kv_heads, how.size, table + row.at * width_of_base(how), how.table_width,
                    how.interleaved != 0);
      if (how.turn) round(*how.turn, plain, how.kv_heads, nullptr, base);
      less = how.turn ? base : plain;
    }
    for (int64_t i = 0; i < width; ++i) keys[i] -= less[i];
    k = keys;
  }
  put_side(a.keys, how.key_how, k, page.keys.get(), place, own);
  put_side(a.values, how.value_how, v, page.values.get(), place, own);
}

void Engine::put_side(const Side& side, const paley_rounding* how, const float* x, uint8_t* half, int64_t place,
                      Scratch& own) {
  const auto halves = [&](const float* values, int32_t count) {
    own.halves.resize(count);
    steps_.put_half(values, count, own.halves.data());
    return own.halves.data();
  };
  if (side.bits == 16) {
    const uint16_t* stored = halves(x, side.heads * side.width);
    for (int32_t head = 0; head < side.heads; ++head) side.put_halves(half, head, place, stored + head * side.width);
    return;
  }
  own.codes.resize(static_cast<size_t>(side.heads) * side.width);
  own.zeros.resize(static_cast<size_t>(side.heads) * side.groups);
  own.floats.resize(static_cast<size_t>(side.heads) * side.groups);
  round(*how, x, side.heads, nullptr, nullptr, own.codes.data(), own.floats.data(), own.zeros.data());
  const uint16_t* scales = halves(own.floats.data(), side.heads * side.groups);
  for (int32_t head = 0; head < side.heads; ++head) {
    side.put_codes(half, head, place, own.codes.data() + int64_t{head} * side.width);
    for (int32_t g = 0; g < side.groups; ++g) {
      const int64_t at = int64_t{head} * side.groups + g;
      side.scales_of(half, head, g)[place] = scales[at];
      if (side.affine) side.zeros_of(half, head, g)[place] = own.zeros[at];
    }
  }
}

void Engine::query_row(const Attention& a, int64_t row, const float* table, Scratch& own) {
  const paley_attention& how = a.how;
  const float* q = wire(how.queries, row);
  float* to = queries_.data() + row * how.heads * a.keys.padded;
  const float* turned = q;
  if (how.turn) {
    own.rows.resize(static_cast<size_t>(how.heads) * a.keys.width);
    round(*how.turn, q, how.heads, nullptr, own.rows.data());
    turned = own.rows.data();
  }
  for (int32_t head = 0; head < how.heads; ++head, to += a.keys.padded, turned += a.keys.width) {
    for (int32_t i = 0; i < a.keys.width; ++i) to[i] = turned[i] * how.scaling;
    std::fill(to + a.keys.width, to + a.keys.padded, 0.0f);
  }
  if (how.base != PALEY_TURNED_BASE) return;
  const int64_t wide = width_of_base(how), group = how.heads / how.kv_heads;
  for (int32_t head = 0; head < how.heads; ++head) {
    const float *mine = q + int64_t{head} * how.size, *first = how.offsets + head / group * how.size;
    const float* others = first + int64_t{how.kv_heads} * how.size;
    float* base = bases_.data() + (row * how.heads + head) * wide;
    std::fill_n(base, wide, 0.0f);
    steps_.base(mine, others, how.table_width, how.interleaved != 0, base);
    own.floats.assign(wide, 0.0f);
    steps_.base(mine, first, how.table_width, how.interleaved != 0, own.floats.data());
    float at_first = 0.0f;  // the score of the first token's base, less that of the others' at its place
    for (int64_t i = 0; i < wide; ++i) at_first += (own.floats[i] - base[i]) * table[i];
    for (int32_t i = how.table_width; i < how.size; ++i) at_first += mine[i] * (first[i] - others[i]);
    for (int64_t i = 0; i < wide; ++i) base[i] *= how.scaling;
    firsts_[row * how.heads + head] = at_first * how.scaling;
  }
}

// Each piece of work is the queries of a few tokens of one part and one head of keys, at all positions or, if there
// are few pieces, at those of one segment. Results of segments are joined in their order either way.
void Engine::look(const Attention& a, const float* table) {
  const paley_attention& how = a.how;
  const int64_t group = how.heads / how.kv_heads, together = std::max<int64_t>(1, MAX_ROWS / 2 / group);
  struct Piece {
    int64_t row, tokens, at;  // the first of its tokens, and its position
    const Page* pages;
    int32_t head;
    int64_t first, last;  // segments
  };
  std::vector<Piece> pieces;
  int64_t row = 0;
  for (const Part& part : *parts_) {
    for (int64_t t = 0; t < part.tokens; t += together) {
      const int64_t tokens = std::min(together, part.tokens - t), at = part.context->length() + t;
      const int64_t low = how.window ? std::max<int64_t>(0, at - how.window + 1) : 0;
      for (int32_t head = 0; head < how.kv_heads; ++head) {
        pieces.push_back({row + t, tokens, at, part.context->layers_[how.layer].data(), head, low / SEGMENT,
                          (at + tokens - 1) / SEGMENT});
      }
    }
    row += part.tokens;
  }
  const int64_t base_width = width_of_base(how);
  const int64_t wide = a.values.padded, place = wide + 2;  // sums, most, total
  const int64_t rows = together * group;
  const bool split = static_cast<int64_t>(pieces.size()) < 8 * threads;
  std::vector<Piece> items;
  for (const Piece& piece : pieces) {
    for (int64_t s = piece.first; split && s <= piece.last; ++s) {
      items.push_back(piece);
      items.back().first = items.back().last = s;
    }
    if (!split) items.push_back(piece);
  }
  if (split && static_cast<int64_t>(partials_.size()) < static_cast<int64_t>(items.size()) * rows * place) {
    partials_.resize(items.size() * static_cast<size_t>(rows * place));
  }
  int64_t cost = 0;
  for (const Piece& item : items) {
    const int64_t seen = std::min((item.last + 1) * SEGMENT, item.at + item.tokens) - item.first * SEGMENT;
    cost += seen * (a.keys.width + wide) * item.tokens * group;
  }

  // What all segments of a piece share, in the thread's scratch.
  const auto gather = [&](const Piece& piece, Scratch& own) {
    const int64_t count = piece.tokens * group;
    own.floats.resize(static_cast<size_t>(count) * (a.keys.padded + base_width + 3) +
                      static_cast<size_t>(count) * wide);
    own.positions.resize(count);
    own.attention.resize(attend_scratch(a.keys, a.values));
    float* queries = own.floats.data();
    float* bases = queries + count * a.keys.padded;
    float* firsts = bases + count * base_width;
    for (int64_t t = 0; t < piece.tokens; ++t) {
      const int64_t from = (piece.row + t) * how.heads + piece.head * group;
      std::copy_n(queries_.data() + from * a.keys.padded, group * a.keys.padded, queries + t * group * a.keys.padded);
      if (how.base == PALEY_TURNED_BASE) {
        std::copy_n(bases_.data() + from * base_width, group * base_width, bases + t * group * base_width);
        std::copy_n(firsts_.data() + from, group, firsts + t * group);
      }
      std::fill_n(own.positions.data() + t * group, group, piece.at + t);
    }
  };
  const auto segment = [&](const Piece& piece, int64_t s, Scratch& own, float* to) {
    const int64_t count = piece.tokens * group;
    float* queries = own.floats.data();
    float* bases = queries + count * a.keys.padded;
    float* firsts = bases + count * base_width;
    float* most = firsts + count;
    float* total = most + count;
    float* sums = total + count;
    const bool turned = how.base == PALEY_TURNED_BASE;
    steps_.attend({&a.keys, &a.values, piece.pages, piece.head, s * SEGMENT,
                   std::min((s + 1) * SEGMENT, piece.at + piece.tokens), static_cast<int32_t>(count), queries,
                   turned ? bases : nullptr, firsts, table, static_cast<int32_t>(base_width), own.positions.data(),
                   how.window, how.cap, own.attention.data(), most, total, sums});
    for (int64_t r = 0; r < count; ++r) {
      float* mine = to + r * place;
      std::copy_n(sums + r * wide, wide, mine);
      mine[wide] = most[r];
      mine[wide + 1] = total[r];
    }
  };
  const auto begin = [&](float* joined, int64_t count) {
    std::fill_n(joined, count * place, 0.0f);
    for (int64_t r = 0; r < count; ++r) joined[r * place + wide] = -INFINITY;
  };
  const auto add = [&](float* joined, const float* more, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      float* mine = joined + r * place;
      const float* its = more + r * place;
      steps_.join(mine + wide, mine + wide + 1, mine, its[wide], its[wide + 1], its, static_cast<int32_t>(wide));
    }
  };
  const auto finish = [&](const Piece& piece, float* joined, Scratch& own) {
    for (int64_t t = 0; t < piece.tokens; ++t) {
      for (int64_t g = 0; g < group; ++g) {
        float* mine = joined + (t * group + g) * place;
        const float total = mine[wide + 1];
        for (int64_t i = 0; i < wide; ++i) mine[i] /= total;
        float* to = wire(how.out, piece.row + t) + (piece.head * group + g) * how.size;
        if (how.value_back) {
          own.rows.resize(a.values.width);
          std::copy_n(mine, a.values.width, own.rows.data());
          round(*how.value_back, own.rows.data(), 1, nullptr, to);
        } else {
          std::copy_n(mine, how.size, to);
        }
      }
    }
  };

  const auto item = [&](int64_t i, int thread) {
    Scratch& own = scratch_[thread];
    const Piece& piece = items[i];
    gather(piece, own);
    if (split) return segment(piece, piece.first, own, partials_.data() + i * rows * place);
    own.joined.resize(static_cast<size_t>(2 * rows * place));
    float *joined = own.joined.data(), *more = joined + rows * place;
    begin(joined, piece.tokens * group);
    for (int64_t s = piece.first; s <= piece.last; ++s) {
      segment(piece, s, own, more);
      add(joined, more, piece.tokens * group);
    }
    finish(piece, joined, own);
  };
  if (cost < 2 * SHARE) {
    for (size_t i = 0; i < items.size(); ++i) item(static_cast<int64_t>(i), 0);
  } else {
    pool_.run(static_cast<int64_t>(items.size()), item);
  }
  if (!split) return;
  Scratch& own = scratch_[0];
  own.joined.resize(static_cast<size_t>(rows * place));
  int64_t at = 0;
  for (const Piece& piece : pieces) {
    begin(own.joined.data(), piece.tokens * group);
    for (int64_t s = piece.first; s <= piece.last; ++s) {
      add(own.joined.data(), partials_.data() + at++ * rows * place, piece.tokens * group);
    }
    finish(piece, own.joined.data(), own);
  }
}

}  // namespace paley
