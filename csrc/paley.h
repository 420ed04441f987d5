// The C ABI of Paley's native kernels: everything that Python calls by ctypes.
//
// No Python header is used, so one library serves every Python. A function returns 0, or one of the codes below;
// no exception leaves the library. A change of a signature or its meaning needs a new PALEY_ABI_VERSION here and
// ABI_VERSION in src/paley/kernels/native.py.
#pragma once

#include <stdint.h>

#define PALEY_ABI_VERSION 16

#if defined(_WIN32)
#define PALEY_EXPORT __declspec(dllexport)
#else
#define PALEY_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum paley_status {
  PALEY_OK = 0,
  PALEY_BAD_ARGUMENT = 1,
  PALEY_OUT_OF_MEMORY = 2,
  PALEY_INTERNAL = 3,
};

// Instruction sets, ascending. A level that this machine lacks gives PALEY_BAD_ARGUMENT. paley_planes_matmul needs
// more instructions of each level, so it has its own best level.
enum paley_level {
  PALEY_PORTABLE = 0,
  PALEY_AVX2 = 1,    // with FMA; planes: with F16C too
  PALEY_AVX512 = 2,  // AVX-512F; planes: with BW, VBMI, VNNI and VPOPCNTDQ too (Ice Lake, Zen 4 and later)
  PALEY_AVX512_BF16 = 3,  // products of bfloat16 (Cooper Lake, Zen 4 and later); only paley_products has it
  PALEY_AMX_BF16 = 4,   // likewise, in tiles (Sapphire Rapids and later), in another order
  // As PALEY_AVX2, with AVX-VNNI (Alder Lake, Zen 5 and later); only paley_matmul has it and these.
  PALEY_AVX2_VNNI = 5,
  PALEY_AMX = 6,        // as PALEY_AVX512, with AMX-INT8 (Sapphire Rapids and later)
  PALEY_NEON = 7,       // Arm, with DotProd (Armv8.4, and most of 8.2)
};

PALEY_EXPORT int32_t paley_abi_version(void);

// parallel: GOMP_parallel of the libgomp whose threads the kernels are to use, or null for threads of their own.
PALEY_EXPORT int32_t paley_borrow_threads(void* parallel);

// The best level of this machine for paley_nearest_points.
PALEY_EXPORT int32_t paley_best_level(void);

// The best level of this machine for paley_planes_matmul, at most paley_best_level.
PALEY_EXPORT int32_t paley_best_planes_level(void);

// The best level of this machine for paley_products.
PALEY_EXPORT int32_t paley_best_products_level(void);

// x [count, p] and points [n, p], finite, 1 <= p <= 8, 1 <= n <= 65536 -> codes [count]: the index of the
// greatest score -|c|^2/2 + x0 c0 + x1 c1 + ..., summed in float64 in this order; the lowest of equal ones.
// In x infinities count as the largest float32 and NaN as 0. The codes depend on neither level nor threads.
PALEY_EXPORT int32_t paley_nearest_points(const float* x, int64_t count, const float* points, int32_t n, int32_t p,
                                          int32_t level, int32_t threads, int32_t* codes);

// How a code of p values, 1 <= p <= 4, is rounded: to the nearest of its points, times a scale.
struct paley_table {
  const float* points;  // [n, p]; p = 1: ascending, and [rows, n] if each row has its own
  int32_t n, p, own;
  // p = 1: the code of y is (y - first) / step, rounded, if step > 0; else the number of edges [n - 1] (or
  // [rows, n - 1]) below y.
  float first, step;
  const float* edges;
  // p > 1: space in parts^p cells, the last coordinate fastest, side i from low[i] on in steps of width[i]. The nearest
  // point of anything in cell k is one of members[starts[k] .. starts[k + 1]), which ascend. bias: -|c|^2 / 2. Made by
  // paley_cells.
  int32_t parts;
  float low[4], width[4];
  const double* bias;
  const int32_t* starts;
  const uint16_t* members;
};

// The table's points, parts, low and width -> bias [n], starts [parts^p + 1], and members, of which there are *count.
// More than `capacity` are not written: call again.
PALEY_EXPORT int32_t paley_cells(const paley_table* table, int64_t capacity, double* bias, int32_t* starts,
                                 uint16_t* members, int64_t* count);

// Which of a group's scales rounds it best: x [groups, size]; importance [period, size], or null: weights of the
// squared errors, group g has row g % period; the tried scales, and zeros unless null, [groups, tries] -> best
// [groups], the first try of least error. The table has p = 1 and no rows of its own. Results depend on neither level
// nor threads.
PALEY_EXPORT int32_t paley_search_scales(const paley_table* table, const float* x, int64_t groups, int32_t size,
                                         const float* importance, int64_t period, const float* scales,
                                         const float* zeros, int32_t tries, int32_t level, int32_t threads,
                                         int32_t* best);

// GPTQ within a block of columns: rounds weights [rows, columns] code by code, and after each changes the columns to
// come by the errors times `spread` [columns, columns], upper triangular. scales, and zeros unless null, [rows,
// columns] by strides. -> codes [rows, ceil(columns / p)] and errors [rows, columns], divided by spread's diagonal
// blocks. Results depend on neither level nor threads.
PALEY_EXPORT int32_t paley_feedback(const paley_table* table, int32_t rows, int32_t columns, const float* weights,
                                    int64_t weights_row, const float* spread, const float* scales, const float* zeros,
                                    int64_t scale_row, int64_t scale_column, int32_t level, int32_t threads,
                                    int32_t* codes, float* errors);

// Coordinate descent within such a block: each code becomes the best one, if it is better, with all others as they
// are. pull [rows, columns]: (target - values) gram, of the whole rows; gram [columns, columns]: the block's own;
// inverse [codes, p, p]: of its diagonal blocks. -> codes, in place, and by how much values moved [rows, columns].
PALEY_EXPORT int32_t paley_descent(const paley_table* table, int32_t rows, int32_t columns, const float* pull,
                                   int64_t pull_row, const float* gram, const float* inverse, const float* scales,
                                   const float* zeros, int64_t scale_row, int64_t scale_column, int32_t level,
                                   int32_t threads, int32_t* codes, float* moves);

// After a descent: pull [rows, width] less moves [rows, columns], most of them 0, times gram [columns, width]. The
// terms of a sum are taken off one after the other.
PALEY_EXPORT int32_t paley_follow(int32_t rows, int32_t columns, int32_t width, const float* moves, const float* gram,
                                  int32_t level, int32_t threads, float* pull);

// A trellis-coded grid: a code of `bits` bits and those before it make a state of state_bits bits, which has p values.
// The search rounds values times `unit` to whole numbers, levels, within 3840; NaN has the lowest. `costs` has a list
// for each level from -(level_count / 2) to level_count / 2. Sums of costs above 255 become 255; after each step the
// least is taken off all. If the best path of a window has a sum of 255, or if a level is beyond these, the window is
// searched with squared distances of levels.
struct paley_trellis {
  const float* points;    // [p, 2^state_bits]
  const int32_t* levels;  // [p, 2^state_bits]: the points in levels, within 512
  const uint8_t* costs;   // [p, level_count, 2^state_bits]: of each state's value at each level
  int32_t level_count;    // odd, at most 7681
  int32_t state_bits, bits, p;
  float unit;
};

// Rounds the first `columns` of x [rows, wide] to the codes of least squared error, of each row from its state on
// (-1: any). Unless ends [rows] is null, the state after the last of `wide` shares its low bits with it, which needs as
// many codes as make a state. scales [rows, wide] by strides. `keep` codes at a time are decided, with a look at
// `ahead` more. With spread [columns, wide], upper triangular, the columns to come then change by the errors, as in
// paley_feedback; else it is null.
// -> codes [rows, ceil(columns / p)], states after the last, and errors [rows, columns], null without spread. A row of
// no multiple of p columns ends with values of 0. Results depend on neither level nor threads.
PALEY_EXPORT int32_t paley_trellis_codes(const paley_trellis* trellis, int32_t rows, int32_t columns, int32_t wide,
                                         const float* x, int64_t x_row, const float* spread, const float* scales,
                                         int64_t scale_row, int64_t scale_column, int32_t keep, int32_t ahead,
                                         int32_t level, int32_t threads, const int32_t* ends, int32_t* states,
                                         int32_t* codes, float* errors);

// Rows of codes [rows, steps], each a ring: what comes before its first code is its last one. Of `trellis`, points
// alone are read. -> values [rows, steps, p].
PALEY_EXPORT int32_t paley_trellis_values(const paley_trellis* trellis, int64_t rows, int64_t steps,
                                          const uint8_t* codes, int32_t threads, float* values);

// c [m, n] = a [m, k] times b [n, k] transposed, or is added to. Entries lie `row` and `column` floats apart. They are
// rounded to bfloat16, ties to even, and denormal ones to 0; sums are float32 in one order: c depends on neither level
// nor threads, as long as no product is below the least normal float. upper: nothing below the diagonal is wanted.
PALEY_EXPORT int32_t paley_products(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                                    int64_t b_column, int64_t m, int64_t n, int64_t k, int32_t add, int32_t upper,
                                    int32_t level, int32_t threads, float* c);

// What is done to the values of a token: division by a diagonal, a Hadamard transform in blocks, rounding in groups.
struct paley_rounding {
  int32_t in_dim, out_dim;  // values of a token before and after zeros are appended
  int32_t order, m;         // of a block H = Sylvester_(order / m) x H_m, which divides out_dim
  // H_m, transposed unless `back`: +-1, [m, stride], zeros up to the next multiple of 8; null: no transform.
  const double* dense;
  const float* signs;       // [out_dim], or null: multiplied with the values before the transform
  const paley_table* table;  // p = 1; null: nothing is rounded
  int32_t back;  // nothing is rounded, and the transform is undone: x [tokens, out_dim] -> values [.., in_dim]
  int32_t group_size;        // values that share a scale
  int32_t affine;            // the scale reaches from the least to the greatest value, and there is a zero point
  int32_t by_rms;            // else: the scale follows the root mean square, not the greatest absolute value
  int32_t half;              // scales are rounded to float16
  int32_t refit;             // each group becomes the least-squares line through its points
  float factor;              // of both ends; of the greatest value or the root mean square
  float peak;                // the last code of an affine grid
};

// x [tokens, in_dim], diagonal [in_dim] or null -> values [tokens, out_dim], or, if that is null, codes
// [tokens, out_dim] of a table of up to 256 points, with scales and zeros (affine grids only) [tokens, groups]. Sums in
// a transform are exact, and all else is float32 in the order of the torch code (src/paley/core): results depend on
// neither level nor threads.
PALEY_EXPORT int32_t paley_round(const paley_rounding* how, const float* x, int64_t tokens, const float* diagonal,
                                 int32_t level, int32_t threads, float* values, uint8_t* codes, float* scales,
                                 uint8_t* zeros);

// How paley_planes_matmul computes. All paths give the same bits, also on a level that does not implement them.
enum paley_path {
  PALEY_AUTO = 0,
  PALEY_POPCOUNT = 1,  // AND and popcount of bit planes
  PALEY_DOTS = 2,      // integer dot products of bytes
  PALEY_TABLES = 3,    // sums of four inputs, looked up
};

// Weights of four values for each row and group of columns. codes [out, groups * group_size] in 0..3, centroids, as
// float16, finite, [out, groups, 4] -> blob, for any level. group_size: a multiple of 32, at most 512.
// bytes: the blob's, 64 + ceil(out / 16) * groups * (4 * group_size + 128).
PALEY_EXPORT int32_t paley_pack_planes(const uint8_t* codes, const uint16_t* centroids, int32_t out, int32_t groups,
                                       int32_t group_size, int64_t bytes, uint8_t* blob);

// codes [tokens, groups * group_size] in 0..15, scales and zeros, 0..15, [tokens, groups]; the blob of these shapes,
// all its bytes -> y [tokens, out], the product of scales (codes - zeros) with the weights transposed. Sums within a
// group are exact, the rest is float32 in one order: y depends on neither path nor level nor threads. Larger codes or
// zeros only give wrong numbers; another size or header of the blob gives PALEY_BAD_ARGUMENT.
PALEY_EXPORT int32_t paley_planes_matmul(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                                         int64_t tokens, const uint8_t* blob, int64_t bytes, int32_t out,
                                         int32_t groups, int32_t group_size, int32_t path, int32_t level,
                                         int32_t threads, float* y);

// How the codes of a matrix lie in memory and become integers.
enum paley_matrix_kind {
  PALEY_TABLE2 = 0,  // a code is one of 4, 8 or 16 points
  PALEY_TABLE3 = 1,
  PALEY_TABLE4 = 2,
  PALEY_OWN2 = 3,    // as TABLE2, and each row has its own points in each group
  PALEY_PAIRS4 = 4,  // a code of so many bits is one of that many points of two values
  PALEY_PAIRS6 = 5,
  PALEY_PAIRS8 = 6,
  PALEY_LOOK8 = 7,   // a code of so many bits is one of that many points: of 4 or 3 values, of 2 if inputs are fine
  PALEY_LOOK9 = 8,
  PALEY_LOOK10 = 9,
  PALEY_LOOK12 = 10,
  PALEY_BYTES = 11,  // no codes: the values, as int8
  PALEY_WORDS = 12,  // as int16; only if inputs are fine
  PALEY_TRELLIS1 = 13,  // trellis codes of so many bits a value: a value depends on 12 bits of its row's codes
  PALEY_TRELLIS1_5 = 14,
  PALEY_TRELLIS2 = 15,
  PALEY_TRELLIS2_5 = 16,
  PALEY_TRELLIS3 = 17,
  PALEY_TRELLIS3_5 = 18,
  PALEY_TRELLIS4 = 19,
  PALEY_TRELLIS5 = 20,
  PALEY_TRELLIS6 = 21,
  PALEY_TABLE6 = 22,  // as TABLE4, of 64 points
  PALEY_KINDS = 23,
};

// What paley_pack_matrix makes a blob of. A value is table_scale * scale * (point - zero).
struct paley_matrix_source {
  int32_t out, columns, group;  // group: columns that share a scale
  int32_t segment;              // columns that share an input's scale, at most; a group's last ones may be fewer
  int32_t kind, fine;           // fine: inputs are int16, not int8
  int32_t p, affine;            // p: values of a code
  int32_t points;               // of the table; TRELLIS: how many codes there are
  float table_scale;
  // [points, p]: within 127; WORDS and LOOK if fine: within 4095. TRELLIS [384]: for two values what the lower and then
  // what the upper six bits of a state add to a place, 0 .. 255; then the values of places 0 .. 127, within 127. Place
  // 255 - q has that of q times -1.
  const int16_t* table;
  const int32_t* codes;          // [out, ceil(columns / p)]; also for BYTES and WORDS
  const uint16_t* scales;        // float16 [out, groups]
  const uint8_t* zeros;          // [out, groups] if affine
  const int8_t* own;             // OWN2: [out, groups, 4] in place of the table
  int32_t outliers;              // columns that have values of their own: the codes above do not count there
  const int32_t* outlier_columns;  // [outliers], ascending
  const int8_t* outlier_values;    // [out, outliers], within 127
  const uint16_t* outlier_scales;  // float16 [out]
};

// The codes of a matrix as a file has them: each row is a stream of numbers of symbol_bits bits, the least significant
// bit first; each number is per_symbol codes below size, the first one its lowest digit.
struct paley_packed_codes {
  const uint8_t* bytes;  // [out, row_bytes]
  int64_t row_bytes;
  int32_t per_symbol, symbol_bits, size;
};

// How the values of tokens become the integers that meet a matrix. rounding: what is done to them before, or null. If
// it rounds, its codes become map[code] - zero times map_scale times the group's scale; else, or if map is null, values
// are rounded to int8, or to 13 bits if the inputs are fine, with a scale for each segment.
struct paley_inputs_how {
  const paley_rounding* rounding;
  const float* diagonal;  // [in_dim], or null
  const int16_t* map;     // [256]: within 127; within 4095 if fine
  float map_scale;
  const int32_t* outlier_columns;  // those of the matrix: they have a scale of their own for each token
};

// The best level of this machine for paley_matmul, or that which PALEY_ISA names if the machine has it.
PALEY_EXPORT int32_t paley_best_matmul_level(void);

// The levels of this machine for paley_matmul: bit i is set if it has level i.
PALEY_EXPORT int32_t paley_matmul_levels(void);

// -> bytes of the blob. Reads no arrays.
PALEY_EXPORT int32_t paley_matrix_bytes(const paley_matrix_source* source, int64_t* bytes);

// -> the blob, which any level reads.
PALEY_EXPORT int32_t paley_pack_matrix(const paley_matrix_source* source, int64_t bytes, uint8_t* blob);

// The same blob from packed codes; source->codes are not read, unless `codes` is null.
PALEY_EXPORT int32_t paley_pack_stored_matrix(const paley_matrix_source* source, const paley_packed_codes* codes,
                                              int32_t threads, int64_t bytes, uint8_t* blob);

// -> bytes of the inputs of so many tokens for this matrix, and for all of the same columns, groups and segments.
PALEY_EXPORT int32_t paley_inputs_bytes(const uint8_t* blob, int64_t blob_bytes, int64_t tokens, int64_t* bytes);

// x [tokens, in_dim] -> inputs. The blob gives the layout.
PALEY_EXPORT int32_t paley_encode_inputs(const paley_inputs_how* how, const float* x, int64_t tokens,
                                         const uint8_t* blob, int64_t blob_bytes, int32_t threads, int64_t bytes,
                                         uint8_t* inputs);

// inputs of these tokens, as of paley_encode_inputs -> y [tokens, out]. Sums within a segment are exact, the rest is
// float32 in one order: y depends on neither level nor threads. A damaged header of the blob gives PALEY_BAD_ARGUMENT.
PALEY_EXPORT int32_t paley_matmul(const uint8_t* inputs, int64_t inputs_bytes, int64_t tokens, const uint8_t* blob,
                                  int64_t blob_bytes, int32_t level, int32_t threads, float* y);

#ifdef __cplusplus
}
#endif
