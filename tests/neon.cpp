// Products of every kind of matrix by NEON against the portable code, and attention over packed codes against sums of
// doubles: scripts/neon.sh compiles it for aarch64 and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/planes_half.h"
#include "../csrc/steps.h"

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
  const bool trellis = kind >= PALEY_TRELLIS1 && kind <= PALEY_TRELLIS5;
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

paley::Side side_of(int bits, int width, bool is_keys) {
  paley::Side side{};
  side.heads = 1, side.width = width, side.bits = bits, side.group = width, side.affine = bits != 16, side.step = 1.0f;
  side.is_keys = is_keys;
  side.lay_out();
  return side;
}

// Random values of a page, as stored and as doubles [token, width].
std::vector<double> fill(const paley::Side& side, uint8_t* half, int tokens) {
  std::vector<double> found;
  for (int t = 0; t < tokens; ++t) {
    std::vector<uint8_t> codes(side.width);
    std::vector<uint16_t> halves(side.width);
    const uint16_t scale = scale_between(0x2c00, 0x3400);
    const uint8_t zero = static_cast<uint8_t>(draw(0, (1 << std::min(side.bits, 8)) - 1));
    for (int i = 0; i < side.width; ++i) {
      codes[i] = static_cast<uint8_t>(draw(0, (1 << std::min(side.bits, 8)) - 1));
      halves[i] = scale_between(0x3000, 0x4000);
      const double value = (codes[i] - zero) * double{paley::half_to_float(scale)};
      found.push_back(side.bits == 16 ? paley::half_to_float(halves[i]) : value);
    }
    if (side.bits == 16) {
      side.put_halves(half, 0, t, halves.data());
    } else {
      side.put_codes(half, 0, t, codes.data());
      side.scales_of(half, 0, 0)[t] = scale;
      side.zeros_of(half, 0, 0)[t] = zero;
    }
  }
  return found;
}

void attention(int bits, int width, int tokens) {
  const paley::Side keys = side_of(bits, width, true), values = side_of(bits, width, false);
  std::vector<paley::Page> page(1);
  page[0].keys.reset(new uint8_t[keys.bytes]());
  page[0].values.reset(new uint8_t[values.bytes]());
  const auto k = fill(keys, page[0].keys.get(), tokens), v = fill(values, page[0].values.get(), tokens);
  const int rows = 3;
  std::vector<float> q(rows * keys.padded), scratch(paley::attend_scratch(keys, values)), most(rows), total(rows);
  std::vector<float> sums(rows * values.padded);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) q[r * keys.padded + i] = 0.2f * normal();
  }
  const std::vector<int64_t> at(rows, tokens - 1);
  paley::steps_of(PALEY_AMX).attend({&keys, &values, page.data(), 0, 0, tokens, rows, q.data(), nullptr, nullptr,
                                     nullptr, 0, at.data(), 0, 0.0f, scratch.data(), most.data(), total.data(),
                                     sums.data()});
  for (int r = 0; r < rows; ++r) {
    std::vector<double> score(tokens), wanted(width);
    for (int t = 0; t < tokens; ++t) {
      for (int i = 0; i < width; ++i) score[t] += q[r * keys.padded + i] * k[t * width + i];
    }
    const double top = *std::max_element(score.begin(), score.end());
    double all = 0;
    for (int t = 0; t < tokens; ++t) {
      all += std::exp(score[t] - top);
      for (int i = 0; i < width; ++i) wanted[i] += std::exp(score[t] - top) * v[t * width + i];
    }
    for (int i = 0; i < width; ++i) {
      const double error = std::abs(sums[r * values.padded + i] / total[r] - wanted[i] / all);
      check(error < 2e-3, "attention of bits, width, tokens", bits, width, tokens);
    }
  }
}

}  // namespace

int main() {
  const bool neon = paley_matmul_levels() >> PALEY_NEON & 1;
  const int points[] = {4, 8, 16, 4, 16, 64, 256, 256, 512, 1024, 4096, 255, 255, 2, 8, 4, 32, 8, 128, 16, 32, 64};
  for (int tokens : {1, 5}) {
    for (int kind = 0; neon && kind < PALEY_KINDS; ++kind) {
      const bool pairs = kind >= PALEY_PAIRS4 && kind <= PALEY_PAIRS8;
      const bool look = kind >= PALEY_LOOK8 && kind <= PALEY_LOOK12;
      const bool two = kind == PALEY_TRELLIS1_5 || kind == PALEY_TRELLIS2_5 || kind == PALEY_TRELLIS3_5;
      const int p = pairs || two ? 2 : look ? 4 : 1;
      if (kind != PALEY_WORDS) product(kind, false, p, points[kind], false, tokens);
      if (kind <= PALEY_TABLE4) product(kind, false, p, points[kind], true, tokens);
      if (look || kind == PALEY_WORDS || kind == PALEY_BYTES || kind == PALEY_TRELLIS5) {
        product(kind, true, look ? 2 : 1, points[kind], false, tokens);
      }
    }
  }
  for (int bits : {2, 3, 4, 5, 6, 7, 8, 16}) {
    for (int width : {16, 20, 64, 80}) {
      for (int tokens : {1, 17, 64}) attention(bits, width, tokens);
    }
  }
  std::printf("%s: %d faults\n", neon ? "NEON and attention" : "attention", faults);
  return faults != 0;
}
