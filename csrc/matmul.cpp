#include "matmul.h"

#include <cstring>

#include "matmul_levels.h"
#include "matmul_sizes.h"

namespace paley {

Inputs Inputs::in(uint8_t* buffer, const InputsLayout& layout, int64_t tokens) {
  auto* steps = reinterpret_cast<float*>(buffer + tokens * layout.row_bytes);
  return {layout, tokens, buffer, steps, reinterpret_cast<int32_t*>(steps + tokens * layout.segments)};
}

bool Matrix::open(const uint8_t* blob, int64_t bytes, Matrix* matrix) {
  MatrixHeader h;
  if (bytes < int64_t{sizeof h}) return false;
  std::memcpy(&h, blob, sizeof h);
  if (h.magic != MATRIX_MAGIC || h.bytes != bytes || !good_header(h)) return false;
  const Sizes sizes(h);
  if (sizes.bytes != bytes) return false;
  const auto* columns = reinterpret_cast<const int32_t*>(blob + sizeof h + h.table_bytes);
  for (int32_t i = 0; i < h.outliers; ++i) {
    if (columns[i] <= (i ? columns[i - 1] : -1) || columns[i] >= h.columns) return false;
  }
  *matrix = {h.out, static_cast<Kind>(h.kind), sizes.layout, h.fine != 0, h.affine != 0, h.table_scale,
             blob + sizeof h, blob + sizes.start, sizes.group_bytes, sizes.panel_bytes, columns};
  return true;
}

void matmul(const Matrix& matrix, const Inputs& inputs, int32_t row_begin, int32_t row_end, float* y, int64_t y_row,
            int32_t level) {
  const MatmulTask task{matrix, inputs, row_begin, row_end, y, y_row};
  switch (level) {
#if PALEY_X86
    case PALEY_AMX: return amx::matmul(task);
    case PALEY_AVX512: return avx512::matmul(task);
    case PALEY_AVX2_VNNI: return avx2_vnni::matmul(task);
    case PALEY_AVX2: return avx2::matmul(task);
#elif defined(__aarch64__)
    case PALEY_NEON: return neon::matmul(task);
#endif
    default: return portable::matmul(task);
  }
}

}  // namespace paley
