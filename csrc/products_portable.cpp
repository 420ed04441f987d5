#include "platform.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "products.h"

namespace paley::portable {

// Four floats at a time, in the vector types of the compiler.
struct Vectors {
  static constexpr int64_t COUNT = 4, VECTORS = 2, TALL = 4, WORDS = 2;
  typedef float Vector __attribute__((vector_size(16)));
  using Words = Vector;
  static PALEY_INLINE Vector zero() { return Vector{}; }
  static PALEY_INLINE Words load(const uint32_t* words) {
    Words vector;
    std::memcpy(&vector, words, sizeof vector);
    return vector;
  }
  static PALEY_INLINE Words all(uint32_t word) {
    float x;
    std::memcpy(&x, &word, sizeof x);
    return Words{x, x, x, x};
  }
  static PALEY_INLINE Vector add(Vector sum, Words a, Words b) { return sum + a * b; }
  static PALEY_INLINE void store(float* out, Vector sum) { std::memcpy(out, &sum, sizeof sum); }
};

#include "products_vectors.h"
#include "products_tiles.h"
}  // namespace paley::portable
