#include "engine.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

namespace paley {

namespace {

[[noreturn]] void refuse() { throw std::invalid_argument("model"); }

void check(bool fine) {
  if (!fine) refuse();
}

template <class T>
std::vector<T> copied(const T* from, int32_t count) {
  check(count >= 0 && (from || !count));
  return std::vector<T>(from, from + count);
}

Side side_of(const paley_side& how, int32_t heads, bool is_keys) {
  Side side{};
  side.is_keys = is_keys;
  side.heads = heads;
  side.width = how.width;
  side.bits = how.bits;
  side.group = how.group_size;
  side.affine = how.affine && how.bits != 16;
  side.points = how.points;
  side.first = how.first;
  side.step = how.step;
  check(how.width > 0 && how.width <= 4096);
  check(how.bits == 16 || (how.bits >= 2 && how.bits <= 8 && how.group_size > 0 && how.width % how.group_size == 0));
  side.lay_out();
  return side;
}

using Rounder = void (*)(const RoundingTask&);
Rounder rounder(int32_t level) {
  level = std::min(level, paley_best_level());
#if PALEY_X86
  if (level >= PALEY_AVX512) return avx512::round;
  if (level == PALEY_AVX2) return avx2::round;
#endif
  return portable::round;
}

}  // namespace

Engine::Engine(const paley_model& m, int threads_wanted, int32_t level)
    : vocabulary(m.vocabulary),
      threads(threads_wanted),
      steps_(steps_of(level)),
      round_(rounder(level)),
      pool_(threads_wanted),
      process_(getpid()),
      widths_(copied(m.widths, m.buffers)),
      wires_(copied(m.wire, m.wires)),
      inputs_(copied(m.input, m.inputs)),
      linears_(copied(m.linear, m.linears)),
      matrices_(m.linears),
      layouts_(m.inputs),
      matmul_level_(best_matmul_level()),
      embeddings_(copied(m.embedding, m.embeddings)),
      program_(copied(m.step, m.steps)),
      logits_(m.logits),
      buffers_(m.buffers),
      encoded_(m.inputs),
      integers_(m.inputs),
      products_at_(m.linears),
      scratch_(threads_wanted) {
  check(m.layers >= 0 && m.vocabulary > 0);
  for (const int32_t width : widths_) check(width > 0);
  for (const paley_wire& w : wires_) {
    check(w.buffer >= 0 && w.buffer < m.buffers && w.start >= 0 && w.width > 0 &&
          w.start + w.width <= widths_[w.buffer]);
  }
  const auto wire = [&](int32_t index, int64_t width = -1) {
    check(index >= 0 && index < m.wires && (width < 0 || wires_[index].width == width));
  };
  for (const paley_input& input : inputs_) {
    wire(input.wire);
    check(input.width > 0 && (!input.how || input.how->out_dim == input.width));
    if (const paley_inputs_how* how = input.integers) {
      const paley_wire& w = wires_[input.wire];
      check(w.width == widths_[w.buffer] && w.width == (how->rounding ? how->rounding->in_dim : input.width));
      continue;
    }
    check(input.how || (input.width == wires_[input.wire].width && !input.diagonal));
    check(!input.outliers || (input.own && input.how && input.columns));
  }
  for (int32_t i = 0; i < m.linears; ++i) {
    const paley_linear& linear = linears_[i];
    check(linear.input >= 0 && linear.input < m.inputs && linear.columns == inputs_[linear.input].width);
    wire(linear.wire, linear.rows);
    check(linear.weight && linear.stored >= PALEY_FLOAT32 && linear.stored <= PALEY_MATRIX &&
          linear.stored != PALEY_CODES);
    check((linear.stored == PALEY_MATRIX) == (inputs_[linear.input].integers != nullptr));
    if (linear.stored != PALEY_MATRIX) continue;
    Matrix& matrix = matrices_[i];
    InputsLayout& layout = layouts_[linear.input];
    check(Matrix::open(static_cast<const uint8_t*>(linear.weight), linear.bytes, &matrix) && matrix.out == linear.rows);
    check(matrix.layout.columns == linear.columns && (!layout.columns || layout == matrix.layout));
    layout = matrix.layout;
  }
  for (const paley_embedding& e : embeddings_) check(e.weight && e.width > 0 && e.rows >= m.vocabulary);
  for (const paley_attention& how : copied(m.attention, m.attentions)) {
    Attention a{how, side_of(how.key_side, how.kv_heads, true), side_of(how.value_side, how.kv_heads, false)};
    check(how.layer == static_cast<int32_t>(attentions_.size()) && how.heads % how.kv_heads == 0 && how.window >= 0);
    check(how.heads / how.kv_heads <= MAX_ROWS);
    wire(how.queries, int64_t{how.heads} * how.size);
    wire(how.keys, int64_t{how.kv_heads} * how.size);
    wire(how.values, int64_t{how.kv_heads} * how.size);
    wire(how.out, int64_t{how.heads} * how.size);
    check(how.table < m.tables && how.table_width <= how.size && how.table_width % 2 == 0);
    check(a.keys.bits == 16 || (how.key_how && how.key_how->table));
    check(a.values.bits == 16 || (how.value_how && how.value_how->table));
    check(how.base == PALEY_NO_BASE || (how.offsets && a.keys.bits != 16));
    check(how.base != PALEY_TURNED_BASE || how.table >= 0);
    attentions_.push_back(std::move(a));
  }
  check(static_cast<int32_t>(attentions_.size()) == m.layers);
  wire(logits_, vocabulary);
  for (const paley_step& step : program_) {
    if (step.kind != PALEY_STEP_INPUT && step.kind != PALEY_STEP_MULTIPLY && step.kind != PALEY_STEP_ATTEND) {
      if (step.kind != PALEY_STEP_EMBED) wire(step.in);
      if (step.kind <= PALEY_STEP_NORM || (step.kind >= PALEY_STEP_GATE && step.kind <= PALEY_STEP_LAST)) {
        wire(step.out);
      }
    }
    const int32_t count = step.kind == PALEY_STEP_MULTIPLY ? step.count : 1;
    const int32_t known[] = {m.embeddings, INT32_MAX, m.inputs, m.linears, m.tables, m.attentions};
    if (step.kind >= 0 && step.kind <= PALEY_STEP_ATTEND) {
      check(step.index >= 0 && step.index + count <= known[step.kind]);
    }
    if (step.kind == PALEY_STEP_NORM) check(step.vector && step.size > 0 && wires_[step.in].width % step.size == 0);
    if (step.kind == PALEY_STEP_GATE) wire(step.other, wires_[step.in].width);
    if (step.kind == PALEY_STEP_TURN) {
      check(step.how && step.how->back);
      check(step.how->out_dim == wires_[step.in].width && step.how->in_dim == wires_[step.out].width);
    }
    if (step.kind == PALEY_STEP_EMBED) {
      const paley_embedding& e = embeddings_[step.index];
      check(!e.back || e.back->out_dim == e.width);
      const int32_t width = e.back ? e.back->in_dim : e.width, out = wires_[step.out].width;
      check(width <= e.width && (e.stream ? e.stream->in_dim == width && e.stream->out_dim == out : width == out));
    }
    check(step.kind >= 0 && step.kind <= PALEY_STEP_SCALE);
  }
}

bool Engine::forked() const { return getpid() != process_; }

Context::Context(const Engine& engine) : engine_(engine), layers_(engine.attentions().size()) {}

int64_t Context::bytes() const {
  int64_t total = 0;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const Attention& a = engine_.attentions()[layer];
    for (size_t i = 0; i < layers_[layer].size(); ++i) {
      const int64_t tokens = std::clamp<int64_t>(length_ - static_cast<int64_t>(i) * PAGE, 0, PAGE);
      total += layers_[layer][i].keys ? tokens * (a.keys.token_bytes() + a.values.token_bytes()) : 0;
    }
  }
  return total;
}

void Context::make_room(int64_t tokens) {
  const size_t pages = (tokens + PAGE - 1) / PAGE;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const Attention& a = engine_.attentions()[layer];
    while (layers_[layer].size() < pages) {
      Page page;
      page.keys.reset(new uint8_t[a.keys.bytes]);
      page.values.reset(new uint8_t[a.values.bytes]);
      layers_[layer].push_back(std::move(page));
    }
  }
}

void Context::settle(int64_t length, int64_t keep) {
  length_ = length;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const int64_t window = engine_.attentions()[layer].how.window;
    if (!window) continue;
    for (int64_t i = static_cast<int64_t>(layers_[layer].size()) - 1; i >= 0; --i) {
      Page& page = layers_[layer][i];
      const int64_t begin = i * PAGE, end = begin + PAGE;
      if (end > length - window + 1) continue;  // the next token sees it
      if (!page.keys) continue;
      if (end <= keep - window + 1 || begin >= keep) page = Page();
    }
  }
}

bool Context::truncate(int64_t length) {
  if (length < 0 || length > length_) return false;
  if (length == length_) return true;
  const int64_t pages = (length + PAGE - 1) / PAGE;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const int64_t window = engine_.attentions()[layer].how.window;
    const int64_t first = window ? std::max<int64_t>(0, length - window + 1) : 0;
    for (int64_t i = first / PAGE; i < pages; ++i) {
      if (!layers_[layer][i].keys) return false;
    }
  }
  for (auto& layer : layers_) layer.resize(pages);
  length_ = length;
  return true;
}

}  // namespace paley

// --- the C interface -----------------------------------------------------------------------------------------

namespace {

template <class F>
int32_t guarded(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (const std::invalid_argument&) {
    return PALEY_BAD_ARGUMENT;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}

}  // namespace

extern "C" int32_t paley_engine_new(const paley_model* model, int32_t threads, int32_t level, void** engine) {
  if (!model || !engine || threads < 1 || threads > 1024 || level < 0) return PALEY_BAD_ARGUMENT;
  return guarded([&] {
    *engine = new paley::Engine(*model, threads, level);
    return PALEY_OK;
  });
}

extern "C" int32_t paley_engine_free(void* engine) {
  auto* mine = static_cast<paley::Engine*>(engine);
  if (mine && mine->forked()) return PALEY_OK;  // its threads are the other process's: they cannot be joined here
  delete mine;
  return PALEY_OK;
}

extern "C" int32_t paley_context_new(void* engine, void** context) {
  return guarded([&] {
    *context = new paley::Context(*static_cast<paley::Engine*>(engine));
    return PALEY_OK;
  });
}

extern "C" int32_t paley_context_free(void* context) {
  delete static_cast<paley::Context*>(context);
  return PALEY_OK;
}

extern "C" int32_t paley_context_bytes(const void* context, int64_t* bytes) {
  *bytes = static_cast<const paley::Context*>(context)->bytes();
  return PALEY_OK;
}

extern "C" int32_t paley_context_truncate(void* context, int64_t length) {
  return static_cast<paley::Context*>(context)->truncate(length) ? PALEY_OK : PALEY_BAD_ARGUMENT;
}

extern "C" int32_t paley_read(void* engine, const paley_part* parts, int32_t count, const float* const* tables,
                              int64_t positions, float* logits) {
  auto& mine = *static_cast<paley::Engine*>(engine);
  if (mine.forked() || count < 1) return PALEY_BAD_ARGUMENT;
  return guarded([&] {
    std::vector<paley::Part> found;
    for (int32_t i = 0; i < count; ++i) {
      const paley_part& p = parts[i];
      auto* context = static_cast<paley::Context*>(p.context);
      const bool fits = p.tokens > 0 && p.length == context->length() && p.length + p.tokens <= positions;
      if (!fits || p.keep < 0 || p.keep > p.length) return PALEY_BAD_ARGUMENT;
      for (int64_t t = 0; t < p.tokens; ++t) {
        if (p.ids[t] < 0 || p.ids[t] >= mine.vocabulary) return PALEY_BAD_ARGUMENT;
      }
      found.push_back({context, p.ids, p.tokens, p.keep, p.wanted != 0});
    }
    mine.read(found, tables, positions, logits);
    return PALEY_OK;
  });
}
