// Included inside a namespace after its lanes; see matmul_numbers.h.

constexpr float ROUNDER = 0x1.8p23f;  // (x + ROUNDER) - ROUNDER rounds to whole numbers, halves to even: |x| < 2^22

float greatest_of(const float* x, int size) {
  Floats top = all(0.0f), nans = all(0.0f);
  int i = 0;
  for (; i + W <= size; i += W) {
    const Floats a = load(x + i);
    top = max(top, abs(a));
    nans = fma(a, all(0.0f), nans);
  }
  float most = greatest(top), lanes[W], nan = 0.0f;
  store(lanes, nans);
  for (const float lane : lanes) nan += lane;
  for (; i < size; ++i) {
    most = std::max(most, std::fabs(x[i]));
    nan += x[i] * 0.0f;
  }
  return nan == 0 ? most : NAN;
}

template <class Code, bool DIVIDE>
int32_t whole_numbers(const float* x, int size, float by, float limit, Code* codes) {
  int32_t sum = 0;
  for (int i = 0; i < size; ++i) {
    float y = DIVIDE ? x[i] / by : x[i] * by;
    y = y > -limit ? y : -limit;
    y = y < limit ? y : limit;
    const auto code = static_cast<int32_t>((y + ROUNDER) - ROUNDER);
    codes[i] = static_cast<Code>(code);
    sum += code;
  }
  return sum;
}

constexpr InputNumbers NUMBERS = {greatest_of, whole_numbers<int8_t, false>, whole_numbers<int16_t, false>,
                                  whole_numbers<int8_t, true>, whole_numbers<int16_t, true>};
