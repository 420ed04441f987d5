// The C ABI of the engine: a model as Python describes it, and its contexts. See paley.h, which includes this.
//
// Weights and tables stay the caller's, and must live as long as the engine. Functions return a paley_status.
#pragma once

#include <stdint.h>

#include "paley.h"

#ifdef __cplusplus
extern "C" {
#endif

enum paley_activation { PALEY_SILU = 0, PALEY_GELU_TANH = 1, PALEY_GELU = 2 };
// MATRIX: a blob of paley_pack_matrix.
enum paley_stored { PALEY_FLOAT32 = 0, PALEY_BFLOAT16 = 1, PALEY_FLOAT16 = 2, PALEY_CODES = 3, PALEY_MATRIX = 4 };
enum paley_base { PALEY_NO_BASE = 0, PALEY_MEAN_BASE = 1, PALEY_TURNED_BASE = 2 };

// Columns [start, start + width) of a buffer.
struct paley_wire {
  int32_t buffer, start, width;
};

// What linears read: `wire`, divided by `diagonal`, transformed and rounded as `how` says (null: as it is). `outliers`
// columns are 0 meanwhile, and rounded by themselves as `own` says. width: of the result. integers: in place of all
// that, how values become the integers that matrices read.
struct paley_input {
  int32_t wire, width, outliers;
  const int32_t* columns;
  const float* diagonal;
  const struct paley_rounding* how;
  const struct paley_rounding* turn;  // with outliers: the transform alone, or null
  const struct paley_rounding* own;
  const struct paley_inputs_how* integers;
};

// wire += or = factor (weight [rows, columns] times an input, + bias [rows] unless it is null).
struct paley_linear {
  int32_t stored, input, wire, adds;
  int64_t rows, columns;
  const void* weight;
  const float* bias;
  int64_t bytes;  // of a matrix
  float factor;
};

// Rows of a table, plain or coded (docs/format.md): `symbol_codes` codes in `symbol_bits` bits, each of `p` values of
// points [n, p]; scales and zeros [rows, groups]. back: undoes the transform of the rows; stream: turns what comes out.
struct paley_embedding {
  int32_t stored, width;
  int64_t rows, row_bytes;
  const void* weight;
  int32_t n, p, symbol_codes, symbol_bits, groups;
  const float* points;
  const uint16_t* scales;
  const uint8_t* zeros;
  const struct paley_rounding* back;
  const struct paley_rounding* stream;
  float factor;
};

// Keys or values of a layer in the cache. bits: of a code, or 16; points [2^bits] or null: first + step * code.
struct paley_side {
  int32_t bits, width, group_size, affine;
  const float* points;
  float first, step;
};

struct paley_attention {
  int32_t queries, keys, values, out;  // wires
  int32_t heads, kv_heads, size;       // size: of a head on the wires
  int32_t layer, window;               // window 0: all tokens
  int32_t table, table_width, interleaved;  // RoPE's, for the base
  float scaling, cap;
  struct paley_side key_side, value_side;
  const struct paley_rounding* turn;         // of queries, or null
  const struct paley_rounding* key_how;      // of keys that lack their base
  const struct paley_rounding* value_how;
  const struct paley_rounding* value_back;   // of what comes out, or null
  int32_t base;          // paley_base
  const float* offsets;  // MEAN: [kv_heads, width], transformed; TURNED: [2, kv_heads, size], before RoPE
};

enum paley_step_kind {
  PALEY_STEP_EMBED = 0,     // out = rows of embeddings[index]
  PALEY_STEP_NORM = 1,      // out = or += (flag) norm of `in` in segments of `size`, times vector; value: epsilon
  PALEY_STEP_INPUT = 2,     // makes inputs[index]
  PALEY_STEP_MULTIPLY = 3,  // linears[index .. index + count)
  PALEY_STEP_ROTATE = 4,    // heads of `size` on `in` turn by tables[index], `count` values of each; flag: interleaved
  PALEY_STEP_ATTEND = 5,    // attentions[index]
  PALEY_STEP_GATE = 6,      // out = f(in) * other; index: paley_activation
  PALEY_STEP_TURN = 7,      // out = value * (what `how` makes of `in`)
  PALEY_STEP_LAST = 8,      // out = `in` of the last tokens; later steps have these rows alone
  PALEY_STEP_CAP = 9,       // in = value * tanh(in / value)
  PALEY_STEP_SCALE = 10,    // in = value * in
};

struct paley_step {
  int32_t kind, in, other, out, index, count, size, flag;
  float value;
  const float* vector;
  const struct paley_rounding* how;
};

struct paley_model {
  int32_t buffers, wires, inputs, linears, embeddings, attentions, steps;
  int32_t vocabulary, layers, tables, logits;  // logits: a wire
  const int32_t* widths;  // of the buffers
  const struct paley_wire* wire;
  const struct paley_input* input;
  const struct paley_linear* linear;
  const struct paley_embedding* embedding;
  const struct paley_attention* attention;
  const struct paley_step* step;
};

PALEY_EXPORT int32_t paley_engine_new(const struct paley_model* model, int32_t threads, int32_t level, void** engine);
PALEY_EXPORT int32_t paley_engine_free(void* engine);

PALEY_EXPORT int32_t paley_context_new(void* engine, void** context);
PALEY_EXPORT int32_t paley_context_free(void* context);
PALEY_EXPORT int32_t paley_context_bytes(const void* context, int64_t* bytes);

// Forgets all but `length` tokens; PALEY_BAD_ARGUMENT if what came before has left a window.
PALEY_EXPORT int32_t paley_context_truncate(void* context, int64_t length);

// A part of a call: `tokens` new ones of a context of `length` tokens. A truncation to `keep` must succeed later.
// wanted: whether its logits are.
struct paley_part {
  void* context;
  const int32_t* ids;
  int64_t tokens, length, keep;
  int32_t wanted;
};

// tables: [model->tables][positions, table width], cosines and then sines; positions: a multiple of 64, more than
// any token's. -> logits [wanted parts, vocabulary]. On failure no context has changed its length.
PALEY_EXPORT int32_t paley_read(void* engine, const struct paley_part* parts, int32_t count, const float* const* tables,
                                int64_t positions, float* logits);

#ifdef __cplusplus
}
#endif
