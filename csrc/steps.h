// What the steps of the engine compute, on the calling thread: a table of functions for each instruction set.
//
// Sums have one order that depends on the sizes alone, neither on how work is divided nor on how many tokens are read
// at a time. Instruction sets differ in the last bits.
#pragma once

#include <stdint.h>

#include "kv_cache.h"

namespace paley {

enum Stored : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// y[t][r] for `tokens` tokens and the rows [begin, end) of a plain matrix:
// += or = factor (sum x[t] weight[r] + bias[r]).
struct PlainTask {
  int32_t stored;
  const void* weight;  // [out, in]
  int64_t in, begin, end;
  const float* x;
  int64_t x_stride, tokens;
  const float* bias;  // [out], or null
  float* y;
  int64_t y_stride;
  bool adds;
  float factor;
};

// Attention of `rows` queries to the positions [begin, end) of one head of a context, of a segment that starts at
// `begin`. Query r is of the token at position `at[r]`, and sees the positions (at[r] - window, at[r]].
struct AttendTask {
  const Side* keys;
  const Side* values;
  const Page* pages;  // of the layer, by position / PAGE
  int32_t head;
  int64_t begin, end;
  int32_t rows;
  const float* queries;  // [rows, keys->padded], times the scale of scores
  // What keys are stored without, as what it adds to scores: base [rows, base_width] times table [positions,
  // base_width]; at position 0 it is first [rows]. Null: nothing.
  const float* base;
  const float* first;
  const float* table;
  int32_t base_width;
  const int64_t* at;
  int64_t window;  // 0: no limit
  float cap;       // of scores: cap tanh(s / cap); 0: none
  float* scratch;  // attend_scratch() floats
  float* most;     // [rows]: the greatest score, -inf if nothing is seen
  float* total;    // [rows]: the sum of the weights exp(score - most)
  float* sums;     // [rows, values->padded]: the weighted sum of the values
};

struct Steps {
  // y [rows, size] = x / rms(x) * gain, or is added to.
  void (*norm)(const float* x, int64_t x_stride, int64_t rows, const float* gain, int32_t size, float epsilon, float* y,
               int64_t y_stride, bool adds);
  // RoPE of heads [heads, size]: the pairs (i, i + width / 2), or (2 i, 2 i + 1) if they are interleaved, turn by table
  // [cos width / 2, sin width / 2].
  void (*rotate)(float* x, int32_t heads, int32_t size, const float* table, int32_t width, bool interleaved);
  // q and what is taken off keys before RoPE, m, both of a head -> base [width]: q RoPE_n(m) = base table_n + beyond.
  void (*base)(const float* q, const float* m, int32_t width, bool interleaved, float* base);
  // y [n] = f(gate) * up
  void (*gate)(const float* gate, const float* up, int64_t n, int32_t activation, float* y);
  void (*cap)(float* x, int64_t n, float cap);
  void (*plain)(const PlainTask& task);
  // Values [n] as float16, the largest finite one for what is beyond it.
  void (*put_half)(const float* values, int32_t n, uint16_t* to);
  void (*attend)(const AttendTask& task);
  // Joins the results of two parts of the positions, the first in place.
  void (*join)(float* most, float* total, float* sums, float more_most, float more_total, const float* more_sums,
               int32_t width);
};

// A page of decoded values, and scores; for integers (attention_integers.h) three floats and the sums of groups of each
// row, and three bytes of each value and weight.
inline int64_t attend_scratch(const Side& keys, const Side& values) {
  const int64_t wide = keys.padded > values.padded ? keys.padded : values.padded;
  return PAGE * wide + MAX_ROWS * (SEGMENT + 3 + keys.groups + 3 * (keys.padded + SEGMENT) / 4);
}

extern const Steps STEPS_PORTABLE;
#if PALEY_X86
extern const Steps STEPS_AVX2, STEPS_AVX512;
#endif

// The table for a level of paley_level; the best one of this machine that is not above it.
const Steps& steps_of(int32_t level);

}  // namespace paley
