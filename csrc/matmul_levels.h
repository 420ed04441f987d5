// What a level has of the product, once for each instruction set.
#pragma once

#include "matmul.h"

namespace paley {

struct MatmulTask {
  const Matrix& matrix;
  const Inputs& inputs;
  int32_t row_begin, row_end;
  float* y;
  int64_t y_row;
};

namespace amx {
void matmul(const MatmulTask& task);
}
namespace avx512 {
void matmul(const MatmulTask& task);
}
namespace avx2_vnni {
void matmul(const MatmulTask& task);
}
namespace avx2 {
void matmul(const MatmulTask& task);
}
namespace neon {
void matmul(const MatmulTask& task);
}
namespace portable {
void matmul(const MatmulTask& task);
}

}  // namespace paley
