// The C ABI of matmul.h.
#include <algorithm>
#include <atomic>
#include <new>

#include "matmul.h"
#include "parallel.h"

namespace {

template <class Work>
int32_t guarded(const Work& work) {
  try {
    work();
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}

bool good_how(const paley_inputs_how& how, const paley::InputsLayout& layout) {
  if (layout.outliers && !how.outlier_columns) return false;
  for (int32_t i = 0; i < layout.outliers; ++i) {
    if (how.outlier_columns[i] < 0 || how.outlier_columns[i] >= layout.columns) return false;
  }
  const paley_rounding* rounding = how.rounding;
  if (!rounding) return !how.map && !how.diagonal;
  if (rounding->back || rounding->out_dim != layout.columns || rounding->in_dim > rounding->out_dim) return false;
  if (!how.map) return true;
  // A segment reads one scale of the inputs' groups.
  const int32_t size = rounding->group_size;
  if (!rounding->table || rounding->table->n > 256 || rounding->refit) return false;
  if (size < 1 || layout.columns % size) return false;
  const bool inside = size % layout.segment == 0 && (layout.group % layout.segment == 0 || size % layout.group == 0);
  const int32_t most = layout.per == 2 ? 4095 : 127;
  return inside && *std::max_element(how.map, how.map + 256) <= most &&
         *std::min_element(how.map, how.map + 256) >= -most - 1;
}

}  // namespace

extern "C" int32_t paley_matrix_bytes(const paley_matrix_source* source, int64_t* bytes) {
  *bytes = paley::matrix_bytes(*source);
  return *bytes < 0 ? PALEY_BAD_ARGUMENT : PALEY_OK;
}

extern "C" int32_t paley_pack_matrix(const paley_matrix_source* source, int64_t bytes, uint8_t* blob) {
  return paley_pack_stored_matrix(source, nullptr, 1, bytes, blob);
}

extern "C" int32_t paley_pack_stored_matrix(const paley_matrix_source* source, const paley_packed_codes* codes,
                                            int32_t threads, int64_t bytes, uint8_t* blob) {
  if (threads < 1 || bytes != paley::matrix_bytes(*source) || bytes < 0) return PALEY_BAD_ARGUMENT;
  bool good = false;
  const int32_t status = guarded([&] { good = paley::pack_matrix(*source, codes, threads, blob); });
  return status != PALEY_OK || good ? status : PALEY_BAD_ARGUMENT;
}

extern "C" int32_t paley_inputs_bytes(const uint8_t* blob, int64_t blob_bytes, int64_t tokens, int64_t* bytes) {
  paley::Matrix matrix;
  if (tokens < 0 || tokens > (int64_t{1} << 32)) return PALEY_BAD_ARGUMENT;
  if (!paley::Matrix::open(blob, blob_bytes, &matrix)) return PALEY_BAD_ARGUMENT;
  *bytes = matrix.layout.bytes(tokens);
  return PALEY_OK;
}

extern "C" int32_t paley_encode_inputs(const paley_inputs_how* how, const float* x, int64_t tokens,
                                       const uint8_t* blob, int64_t blob_bytes, int32_t threads, int64_t bytes,
                                       uint8_t* inputs) {
  int64_t wanted;
  paley::Matrix matrix;
  if (threads < 1 || paley_inputs_bytes(blob, blob_bytes, tokens, &wanted) != PALEY_OK || wanted != bytes ||
      !paley::Matrix::open(blob, blob_bytes, &matrix) || !good_how(*how, matrix.layout)) {
    return PALEY_BAD_ARGUMENT;
  }
  const auto in = paley::Inputs::in(inputs, matrix.layout, tokens);
  return guarded([&] {
    constexpr int64_t PIECE = 16;
    std::atomic<int64_t> next{0};
    const int64_t width = how->rounding ? how->rounding->in_dim : matrix.layout.columns;
    paley::run_workers(threads, [&] {
      for (int64_t t; (t = next.fetch_add(PIECE)) < tokens;) {
        paley::encode_inputs(*how, x + t * width, t, std::min(PIECE, tokens - t), in);
      }
    });
  });
}

extern "C" int32_t paley_matmul(const uint8_t* inputs, int64_t inputs_bytes, int64_t tokens, const uint8_t* blob,
                                int64_t blob_bytes, int32_t level, int32_t threads, float* y) {
  int64_t wanted;
  paley::Matrix matrix;
  if (threads < 1 || paley_inputs_bytes(blob, blob_bytes, tokens, &wanted) != PALEY_OK || wanted != inputs_bytes ||
      !paley::Matrix::open(blob, blob_bytes, &matrix)) {
    return PALEY_BAD_ARGUMENT;
  }
  if (level < 0 || level > PALEY_NEON || !(paley_matmul_levels() >> level & 1)) return PALEY_BAD_ARGUMENT;
  const auto in = paley::Inputs::in(const_cast<uint8_t*>(inputs), matrix.layout, tokens);
  return guarded([&] {
    // Pieces of some panels; few rows are divided more finely, so that all threads have work.
    const int64_t panels = (matrix.out + paley::PANEL_ROWS - 1) / paley::PANEL_ROWS;
    const int64_t piece = paley::PANEL_ROWS * std::clamp<int64_t>(panels / (4 * threads), 1, 16);
    std::atomic<int64_t> next{0};
    paley::run_workers(threads, [&] {
      for (int64_t row; (row = next.fetch_add(piece)) < matrix.out;) {
        const auto end = static_cast<int32_t>(std::min<int64_t>(row + piece, matrix.out));
        paley::matmul(matrix, in, static_cast<int32_t>(row), end, y, matrix.out, level);
      }
    });
  });
}
