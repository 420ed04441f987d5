// Four floats at a time by the vector types of GCC and Clang, which every processor of theirs has in some way.
// Included inside a namespace; see nearest_portable.cpp.
constexpr int W = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
using Mask = Ints;  // -1 or 0

PALEY_INLINE Floats load(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE Ints load(const int32_t* p) {
  Ints a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
PALEY_INLINE void store(int32_t* p, Ints a) { std::memcpy(p, &a, sizeof a); }
PALEY_INLINE Floats all(float a) { return Floats{a, a, a, a}; }
PALEY_INLINE Ints all(int32_t a) { return Ints{a, a, a, a}; }
PALEY_INLINE Ints select(Mask m, Ints yes, Ints no) { return (m & yes) | (~m & no); }
PALEY_INLINE Floats select(Mask m, Floats yes, Floats no) { return (Floats)select(m, (Ints)yes, (Ints)no); }
PALEY_INLINE Mask greater(Floats a, Floats b) { return (Mask)(a > b); }
PALEY_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
PALEY_INLINE Floats sub(Floats a, Floats b) { return a - b; }
PALEY_INLINE Floats max(Floats a, Floats b) { return select(greater(a, b), a, b); }
PALEY_INLINE Floats min(Floats a, Floats b) { return select(greater(b, a), a, b); }
PALEY_INLINE Floats abs(Floats a) { return (Floats)((Ints)a & all(0x7fffffff)); }
PALEY_INLINE uint32_t bits(Mask m) {
  return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
}

PALEY_INLINE Mask is_nan(Floats a) { return (Mask)(a != a); }
PALEY_INLINE float greatest(Floats a) {
  const float b = a[0] > a[1] ? a[0] : a[1], c = a[2] > a[3] ? a[2] : a[3];
  return b > c ? b : c;
}
PALEY_INLINE Ints add(Ints a, Ints b) { return a + b; }

// table[at] of each lane; the first has sixteen entries.
PALEY_INLINE Floats pick(const float* table, Ints at) {
  return Floats{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
}
PALEY_INLINE Floats pick_of_16(const float* table, Ints at) { return pick(table, at); }

typedef double Doubles __attribute__((vector_size(16)));
PALEY_INLINE Doubles load(const double* p) {
  Doubles a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
PALEY_INLINE void store(double* p, Doubles a) { std::memcpy(p, &a, sizeof a); }
PALEY_INLINE Doubles all(double a) { return Doubles{a, a}; }
PALEY_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// Writes the lanes of `which` side by side. -> how many.
template <class T, class Lanes>
PALEY_INLINE int keep(T* p, Lanes a, uint32_t which) {
  int count = 0;
  for (; which; which &= which - 1) p[count++] = a[lowest_bit(which)];
  return count;
}
