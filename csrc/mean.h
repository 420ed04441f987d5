// Included inside a namespace.

// The mean of x [size], summed by halves in place: as `mean` of src/paley/core/rounding.py.
inline float mean_of(float* x, int size) {
  for (int n = size; n > 1; n -= n / 2) {
    const int half = n / 2;
    const float* upper = x + (n - half);
    for (int i = 0; i < half; ++i) x[i] += upper[i];
  }
  return x[0] / static_cast<float>(size);
}
