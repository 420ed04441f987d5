// How values become the integers of inputs, a table of functions for each instruction set. Results are the same.
#pragma once

#include <stdint.h>

#include "platform.h"

namespace paley {

struct InputNumbers {
  // NaN if a value of x [size] is NaN or infinite, else the greatest absolute value.
  float (*greatest)(const float* x, int size);
  // round(x * by) within -limit to limit -> codes [size], and their sum; NaN becomes -limit.
  int32_t (*bytes)(const float* x, int size, float by, float limit, int8_t* codes);
  int32_t (*words)(const float* x, int size, float by, float limit, int16_t* codes);
  // Likewise round(x / by).
  int32_t (*divided_bytes)(const float* x, int size, float by, float limit, int8_t* codes);
  int32_t (*divided_words)(const float* x, int size, float by, float limit, int16_t* codes);
};

extern const InputNumbers INPUTS_PORTABLE;
#if PALEY_X86
extern const InputNumbers INPUTS_AVX2, INPUTS_AVX512;
#endif

}  // namespace paley
