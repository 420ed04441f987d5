// Attention over packed codes against sums of doubles, at each level of instructions: pages, segments, windows, groups,
// heads, every number of bits. Compiled and run by tests/runtime/test_native_attention.py, and for aarch64 by
// scripts/neon.sh.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/planes_half.h"
#include "../csrc/steps.h"

namespace {

std::mt19937 chance(7);
int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(chance); }
float normal() { return std::normal_distribution<float>()(chance); }

constexpr int HEADS = 2;
int faults = 0;
double worst = 0;

struct Case {
  int key_bits, value_bits, width, group;
  bool affine;
  int64_t begin, end, window;
  int rows;
};

// Keys or values of a context's positions [0, end), as stored and as doubles [head][position, width].
struct Stored {
  paley::Side side{};
  std::vector<float> points;
  std::vector<std::unique_ptr<uint8_t[]>> pages;
  std::vector<double> plain[HEADS];

  Stored(int bits, const Case& c, bool is_keys) {
    side.heads = HEADS, side.width = c.width, side.bits = bits, side.group = c.group;
    side.affine = c.affine && bits != 16, side.step = 1.0f, side.is_keys = is_keys;
    if (!side.affine && bits != 16) {  // points of no even grid
      for (int i = 0; i < 1 << bits; ++i) points.push_back(normal() * static_cast<float>(1 << bits) / 4);
      side.points = points.data();
    }
    side.lay_out();
    for (int64_t at = 0; at < c.end; ++at) {
      if (at % paley::PAGE == 0) pages.emplace_back(new uint8_t[side.bytes]());
      for (int head = 0; head < HEADS; ++head) put(pages.back().get(), head, at % paley::PAGE);
    }
  }

  void put(uint8_t* half, int head, int64_t place) {
    const int width = side.width;
    std::vector<uint8_t> codes(width);
    std::vector<uint16_t> halves(width);
    for (int i = 0; i < width; ++i) {
      codes[i] = static_cast<uint8_t>(draw(0, (1 << std::min(side.bits, 8)) - 1));
      halves[i] = static_cast<uint16_t>(draw(0x3000, 0x4000) | draw(0, 1) << 15);
    }
    if (side.bits == 16) {
      side.put_halves(half, head, place, halves.data());
      for (uint16_t value : halves) plain[head].push_back(paley::half_to_float(value));
      return;
    }
    side.put_codes(half, head, place, codes.data());
    for (int g = 0; g < side.groups; ++g) {
      // Some 2 / 2^bits, so that values are about 1.
      const auto scale = static_cast<uint16_t>(draw(0x3c00, 0x4000) - (side.bits << 10));
      const auto zero = static_cast<uint8_t>(draw(0, (1 << side.bits) - 1));
      side.scales_of(half, head, g)[place] = scale;
      if (side.affine) side.zeros_of(half, head, g)[place] = zero;
      for (int i = g * side.group; i < (g + 1) * side.group; ++i) {
        const double point = side.affine ? codes[i] - zero : points[codes[i]];
        plain[head].push_back(point * double{paley::half_to_float(scale)});
      }
    }
  }
};

void attention(const Case& c, int level, const char* name) {
  const Stored keys(c.key_bits, c, true), values(c.value_bits, c, false);
  std::vector<paley::Page> pages(keys.pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    pages[i].keys.reset(new uint8_t[keys.side.bytes]);
    pages[i].values.reset(new uint8_t[values.side.bytes]);
    std::copy_n(keys.pages[i].get(), keys.side.bytes, pages[i].keys.get());
    std::copy_n(values.pages[i].get(), values.side.bytes, pages[i].values.get());
  }
  const int padded = keys.side.padded, out = values.side.padded;
  const int64_t room = paley::attend_scratch(keys.side, values.side);
  for (int head = 0; head < HEADS; ++head) {
    std::vector<float> q(c.rows * padded), scratch(room), most(c.rows), total(c.rows), sums(c.rows * out);
    std::vector<int64_t> at(c.rows);
    for (int r = 0; r < c.rows; ++r) {
      at[r] = std::max<int64_t>(0, c.end - c.rows + r);  // the tokens of a chunk see one another as they come
      for (int i = 0; i < c.width; ++i) q[r * padded + i] = normal() / std::sqrt(static_cast<float>(c.width));
    }
    paley::steps_of(level).attend({&keys.side, &values.side, pages.data(), head, c.begin, c.end, c.rows, q.data(),
                                   nullptr, nullptr, nullptr, 0, at.data(), c.window, 0.0f, scratch.data(), most.data(),
                                   total.data(), sums.data()});
    for (int r = 0; r < c.rows; ++r) {
      std::vector<double> wanted(c.width);
      std::vector<std::pair<int64_t, double>> scores;
      double top = -INFINITY, all = 0;
      for (int64_t t = c.begin; t < c.end; ++t) {
        if (t > at[r] || (c.window && t <= at[r] - c.window)) continue;
        double score = 0;
        for (int i = 0; i < c.width; ++i) score += double{q[r * padded + i]} * keys.plain[head][t * c.width + i];
        scores.emplace_back(t, score);
        top = std::max(top, score);
      }
      for (const auto& [t, score] : scores) {
        const double share = std::exp(score - top);
        all += share;
        for (int i = 0; i < c.width; ++i) wanted[i] += share * values.plain[head][t * c.width + i];
      }
      bool fine = scores.empty() ? most[r] == -INFINITY : total[r] > 0;
      for (int i = 0; i < c.width && !scores.empty(); ++i) {
        const double error = std::abs(sums[r * out + i] / total[r] - wanted[i] / all);
        worst = std::max(worst, error);
        fine = fine && error < 1e-4;
      }
      if (!fine && ++faults < 20) {
        std::printf("differs: %s, keys %d, values %d bits%s, width %d in groups of %d, [%d, %d) window %d, row %d of %d\n",
                    name, c.key_bits, c.value_bits, c.affine ? ", affine" : "", c.width, c.group,
                    static_cast<int>(c.begin), static_cast<int>(c.end), static_cast<int>(c.window), r, c.rows);
      }
    }
  }
}

}  // namespace

int main() {
  const struct {
    int level;
    const char* name;
  } levels[] = {{PALEY_PORTABLE, "portable"}, {PALEY_AVX2, "avx2"}, {PALEY_AMX, "the best"}};
  for (const auto& level : levels) {
    worst = 0;
    for (int bits : {2, 3, 4, 5, 6, 7, 8, 16}) {
      for (bool affine : {true, false}) {
        for (int group : {16, 32, 64}) {
          attention({bits, bits == 16 ? 16 : 10 - bits, 64, group, affine, 0, 130, 0, 3}, level.level, level.name);
        }
        attention({bits, bits, 80, 80, affine, 0, 1, 0, 1}, level.level, level.name);
        attention({bits, bits, 20, 20, affine, 0, 64, 0, 17}, level.level, level.name);
        attention({bits, bits, 64, 32, affine, 0, 512, 0, 5}, level.level, level.name);
        attention({bits, bits, 128, 64, affine, 512, 699, 0, 64}, level.level, level.name);
        attention({bits, bits, 64, 64, affine, 512, 640, 100, 33}, level.level, level.name);
      }
    }
    std::printf("%s: %d faults, largest error %.1e\n", level.name, faults, worst);
  }
  return faults != 0;
}
