// A language model as a list of steps between buffers, as Python describes it (struct paley_model in engine_abi.h).
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "engine_abi.h"
#include "kv_cache.h"
#include "matmul.h"
#include "pool.h"
#include "rounding.h"
#include "steps.h"

namespace paley {

constexpr int64_t SHARE = 20000;  // operations of a thread that are worth waking it

struct Attention {
  paley_attention how;
  Side keys, values;
};

class Engine;

// One text: its pages, layer by layer.
class Context {
 public:
  explicit Context(const Engine& engine);

  int64_t length() const { return length_; }
  int64_t bytes() const;  // of the tokens held
  // Forgets what comes after `length` tokens. -> whether what came before is still there.
  bool truncate(int64_t length);

 private:
  friend class Engine;
  void make_room(int64_t tokens);             // for so many in all
  void settle(int64_t length, int64_t keep);  // tokens were read; a later truncate(keep) must succeed

  const Engine& engine_;
  int64_t length_ = 0;
  std::vector<std::vector<Page>> layers_;
};

// A part of a call: the new tokens of one context. keep: see Context::settle.
struct Part {
  Context* context;
  const int32_t* ids;
  int64_t tokens, keep;
  bool wanted;  // whether the logits after its last token are
};

// What a thread needs for itself.
struct Scratch {
  std::vector<float> floats, attention, rows, joined;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> halves;
  std::vector<int64_t> positions;
};

class Engine {
 public:
  Engine(const paley_model& model, int threads, int32_t level);

  const std::vector<Attention>& attentions() const { return attentions_; }
  bool forked() const;
  // logits [wanted parts, vocabulary]
  void read(const std::vector<Part>& parts, const float* const* tables, int64_t positions, float* logits);

  int32_t vocabulary, threads;

 private:
  struct Row {  // a token of a call
    int32_t part;
    int64_t at;  // its position
    int32_t id;
  };

  float* wire(int32_t index, int64_t row) {
    const paley_wire& w = wires_[index];
    return buffers_[w.buffer].data() + row * widths_[w.buffer] + w.start;
  }
  int64_t stride(int32_t index) const { return widths_[wires_[index].buffer]; }

  // f(begin, end, scratch) for ranges of rows; cost: operations for a row.
  template <class F>
  void for_rows(int64_t rows, int64_t cost, const F& f) {
    const int64_t parts = std::clamp<int64_t>(rows * cost / SHARE, 1, std::min<int64_t>(rows, 4 * threads));
    const int64_t each = (rows + parts - 1) / parts;
    pool_.run((rows + each - 1) / each, [&](int64_t item, int thread) {
      f(item * each, std::min(rows, (item + 1) * each), scratch_[thread]);
    });
  }
  void round(const paley_rounding& how, const float* x, int64_t tokens, const float* diagonal, float* values,
             uint8_t* codes = nullptr, float* scales = nullptr, uint8_t* zeros = nullptr) const;
  void run(const paley_step& step);
  void embed(const paley_step& step);
  void embed_row(const paley_embedding& e, int32_t id, float* to, Scratch& own) const;
  void encode(const paley_input& input, int32_t index);
  void encode_integers(int32_t index);
  Inputs integers(int32_t index);
  void multiply_rows(int32_t linear, int64_t begin, int64_t end);
  void encode_row(const paley_input& input, const float* x, float* to, Scratch& own) const;
  void multiply(const paley_step& step);
  void turn(const paley_step& step);
  void last(const paley_step& step);
  void attend(const paley_step& step);
  void put_row(const Attention& a, const Row& row, const float* k, const float* v, const float* table, Scratch& own);
  void put_side(const Side& side, const paley_rounding* how, const float* x, uint8_t* half, int64_t place,
                Scratch& own);
  void query_row(const Attention& a, int64_t row, const float* table, Scratch& own);
  void look(const Attention& a, const float* table);

  const Steps& steps_;
  void (*round_)(const RoundingTask& task);
  Pool pool_;
  long process_;
  std::vector<int32_t> widths_;
  std::vector<paley_wire> wires_;
  std::vector<paley_input> inputs_;
  std::vector<paley_linear> linears_;
  std::vector<Matrix> matrices_;        // of the linears that are such
  std::vector<InputsLayout> layouts_;   // of the inputs that are integers
  int32_t matmul_level_;
  std::vector<paley_embedding> embeddings_;
  std::vector<Attention> attentions_;
  std::vector<paley_step> program_;
  int32_t logits_;

  // Of the call at hand.
  const std::vector<Part>* parts_ = nullptr;
  const float* const* tables_ = nullptr;
  std::vector<Row> tokens_;
  int64_t rows_ = 0;  // of the buffers that are in use
  std::vector<std::vector<float>> buffers_, encoded_;
  std::vector<std::vector<uint8_t>> integers_;
  std::vector<float> products_;  // of linears that are added to a wire
  std::vector<int64_t> products_at_;
  std::vector<float> queries_, bases_, firsts_, partials_;
  std::vector<Scratch> scratch_;
};

}  // namespace paley
