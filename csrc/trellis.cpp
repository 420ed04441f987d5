#include "trellis.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "parallel.h"
#include "platform.h"

namespace {

bool known(const paley_trellis& grid) {
  if (!grid.points || grid.state_bits != paley::TRELLIS_STATE_BITS) return false;
  return grid.p >= 1 && grid.p <= 2 && grid.bits >= 1 && grid.bits <= 7;
}

bool valid(const paley::TrellisTask& t) {
  const paley_trellis& grid = t.trellis;
  if (!t.x || !t.scales || !t.states || !t.codes || !known(grid) || !grid.costs || !grid.levels) return false;
  const int32_t count = grid.level_count;
  if (!(grid.unit > 0) || count < 1 || count > 2 * paley::FARTHEST + 1 || count % 2 == 0) return false;
  for (int i = 0; i < grid.p << grid.state_bits; ++i) {
    if (grid.levels[i] < -paley::GREATEST || grid.levels[i] > paley::GREATEST) return false;
  }
  if (t.wide < t.columns || t.wide > 1 << 30) return false;
  if (t.keep < 1 || t.ahead < 0 || t.threads < 1) return false;
  // An end can be reached from any state in as many steps as make a state.
  if (t.ends && t.ahead < (grid.state_bits + grid.bits - 1) / grid.bits) return false;
  return t.keep <= 1 << 16 && t.ahead <= 1 << 16 && !t.matrix == !t.errors;
}

// The values [steps, P] of a row, a ring of codes.
template <int P>
void ring(const paley_trellis& grid, int64_t steps, const uint8_t* codes, float* values) {
  const uint32_t size = 1u << grid.state_bits, mask = size - 1, code = (1u << grid.bits) - 1;
  const int64_t memory = (grid.state_bits + grid.bits - 1) / grid.bits;  // codes that a state has bits of
  uint32_t state = 0;
  for (int64_t back = memory - 1; back >= 1; --back) {
    state = state << grid.bits | (codes[(memory * steps - back) % steps] & code);
  }
  for (int64_t step = 0; step < steps; ++step) {
    state = (state << grid.bits | (codes[step] & code)) & mask;
    for (int i = 0; i < P; ++i) values[step * P + i] = grid.points[i * size + state];
  }
}

}  // namespace

extern "C" int32_t paley_trellis_values(const paley_trellis* trellis, int64_t rows, int64_t steps, const uint8_t* codes,
                                        int32_t threads, float* values) {
  if (!trellis || !known(*trellis) || rows < 0 || steps < 0 || threads < 1) return PALEY_BAD_ARGUMENT;
  if (rows == 0 || steps == 0) return PALEY_OK;
  if (!codes || !values) return PALEY_BAD_ARGUMENT;
  constexpr int64_t PIECE = 8;  // rows
  const auto of_row = trellis->p == 1 ? ring<1> : ring<2>;
  std::atomic<int64_t> next{0};
  try {
    paley::run_workers(threads, [&] {
      for (int64_t begin; (begin = next.fetch_add(PIECE)) < rows;) {
        for (int64_t row = begin; row < std::min(begin + PIECE, rows); ++row) {
          of_row(*trellis, steps, codes + row * steps, values + row * steps * trellis->p);
        }
      }
    });
  } catch (...) {
    return PALEY_INTERNAL;
  }
  return PALEY_OK;
}

extern "C" int32_t paley_trellis_codes(const paley_trellis* trellis, int32_t rows, int32_t columns, int32_t wide,
                                       const float* x, int64_t x_row, const float* spread, const float* scales,
                                       int64_t scale_row, int64_t scale_column, int32_t keep, int32_t ahead,
                                       int32_t level, int32_t threads, const int32_t* ends, int32_t* states,
                                       int32_t* codes, float* errors) {
  if (!trellis || rows < 0 || columns < 0) return PALEY_BAD_ARGUMENT;
  if (rows == 0 || columns == 0) return PALEY_OK;
  const paley::TrellisTask task{*trellis,     rows, columns, wide,    x,    x_row,  spread, scales, scale_row,
                                scale_column, keep, ahead,   threads, ends, states, codes,  errors};
  if (!valid(task) || level < PALEY_PORTABLE || level > paley_best_level()) return PALEY_BAD_ARGUMENT;
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t end = ends ? ends[row] : 0;
    if (states[row] < -1 || states[row] >= 1 << trellis->state_bits) return PALEY_BAD_ARGUMENT;
    if (end < 0 || end >= 1 << trellis->state_bits) return PALEY_BAD_ARGUMENT;
  }
  try {
#if PALEY_X86
    const bool words = __builtin_cpu_supports("avx512bw");
    const bool wide = 1 << (trellis->state_bits - trellis->bits) >= 64;  // as many as its bytes
    if (level == PALEY_AVX512 && words && wide) return paley::avx512::trellis(task), PALEY_OK;
    if (level >= PALEY_AVX2) return paley::avx2::trellis(task), PALEY_OK;
#endif
    return paley::portable::trellis(task), PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
