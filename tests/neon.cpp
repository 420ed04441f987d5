// Products of every kind of matrix by NEON against the portable code: scripts/neon.sh compiles it for aarch64 and runs
// it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/paley.h"

namespace {

std::mt19937 chance(7);
int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(chance); }
float normal() { return std::normal_distribution<float>()(chance); }
uint16_t scale_between(int low, int high) { return static_cast<uint16_t>(draw(low, high)); }  // float16, by its bits

int faults = 0;
void check(bool fine, const char* what, int a, int b, int c) {
  if (!fine) ++faults, std::printf("differs: %s %d, %d, %d\n", what, a, b, c);
}

void product(int kind, bool fine, int p, int points, bool affine, int tokens) {
  const bool trellis = kind >= PALEY_TRELLIS1 && kind <= PALEY_TRELLIS6;
  const int out = 37, group = 96, columns = 2 * group, groups = 2;
  std::vector<int16_t> table(trellis ? 384 : points * p);
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<int16_t>(trellis && i < 256 ? draw(0, 255) : draw(-127, 127));
  }
  std::vector<int32_t> codes(out * (columns / p));
  for (auto& code : codes) code = draw(0, points - 1);
  std::vector<uint16_t> scales(out * groups);
  for (auto& scale : scales) scale = scale_between(0x2000, 0x3c00);
  std::vector<uint8_t> zeros(out * groups);
  for (auto& zero : zeros) zero = static_cast<uint8_t>(draw(0, 15));
  std::vector<int8_t> own(out * groups * 4);
  for (auto& point : own) point = static_cast<int8_t>(draw(-127, 127));
  const paley_matrix_source source{out, columns, group, 96, kind, fine, p, affine, points, 0.01f, table.data(),
                                   codes.data(), scales.data(), affine ? zeros.data() : nullptr, own.data(), 0,
                                   nullptr, nullptr, nullptr};
  int64_t bytes = 0, room = 0;
  if (paley_matrix_bytes(&source, &bytes)) return check(false, "no matrix of kind", kind, fine, p);
  std::vector<uint8_t> blob(bytes + 64);
  check(paley_pack_matrix(&source, bytes, blob.data()) == PALEY_OK, "not packed: kind", kind, fine, p);
  std::vector<float> x(tokens * columns);
  for (auto& value : x) value = normal();
  paley_inputs_bytes(blob.data(), bytes, tokens, &room);
  std::vector<uint8_t> inputs(room);
  const paley_inputs_how how{nullptr, nullptr, nullptr, 1.0f, nullptr};
  paley_encode_inputs(&how, x.data(), tokens, blob.data(), bytes, 1, room, inputs.data());
  std::vector<float> y[2];
  for (int i = 0; i < 2; ++i) {
    y[i].assign(tokens * out, NAN);
    paley_matmul(inputs.data(), room, tokens, blob.data(), bytes, i ? PALEY_NEON : PALEY_PORTABLE, 1, y[i].data());
  }
  check(y[0] == y[1], "product of kind", kind, fine, tokens);
}

}  // namespace

int main() {
  const bool neon = paley_matmul_levels() >> PALEY_NEON & 1;
  const int points[] = {4, 8, 16, 4, 16, 64, 256, 256, 512, 1024, 4096, 255, 255, 2, 8, 4, 32, 8, 128, 16, 32, 64, 64};
  for (int tokens : {1, 5}) {
    for (int kind = 0; neon && kind < PALEY_KINDS; ++kind) {
      const bool pairs = kind >= PALEY_PAIRS4 && kind <= PALEY_PAIRS8;
      const bool look = kind >= PALEY_LOOK8 && kind <= PALEY_LOOK12;
      const bool two = kind == PALEY_TRELLIS1_5 || kind == PALEY_TRELLIS2_5 || kind == PALEY_TRELLIS3_5;
      const int p = pairs || two ? 2 : look ? 4 : 1;
      if (kind != PALEY_WORDS) product(kind, false, p, points[kind], false, tokens);
      if (kind <= PALEY_TABLE4) product(kind, false, p, points[kind], true, tokens);
      if (look || kind == PALEY_WORDS || kind == PALEY_BYTES || kind == PALEY_TRELLIS5 || kind == PALEY_TRELLIS6) {
        product(kind, true, look ? 2 : 1, points[kind], false, tokens);
      }
    }
  }
  std::printf("NEON: %s, %d faults\n", neon ? "here" : "not here", faults);
  return faults != 0;
}
