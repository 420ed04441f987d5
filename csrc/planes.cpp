#include "planes.h"

#include <algorithm>
#include <new>

#include "paley.h"
#include "planes_half.h"

namespace paley {
namespace {

bool good_shape(int32_t out, int32_t groups, int32_t group_size) {
  return out > 0 && groups > 0 && group_size > 0 && group_size % 32 == 0 && group_size <= 32 * MAX_WORDS;
}

// Whether a blob of this shape has so many bytes. By division, as a product of wrong numbers might overflow.
bool good_size(int64_t bytes, int32_t out, int32_t groups, int32_t group_size) {
  const int64_t row_of_blocks = groups * record_bytes(group_size / 32);
  const int64_t rest = bytes - static_cast<int64_t>(sizeof(PlanesHeader));
  return rest % row_of_blocks == 0 && rest / row_of_blocks == (int64_t{out} + BLOCK - 1) / BLOCK;
}

// The path that auto takes, for any level and number of tokens. 4096 x 4096, one thread of a Zen 4, ms for popcount,
// dots and tables:
//   AVX-512  1 token  .39  .47  .27   4 tokens  1.17 1.15  .58  64 tokens 14.2 11.8 6.9   (bench/planes_speed.py)
//   AVX2     1 token  .75  .82  .33  16 tokens 12.1  7.1  2.7                             (weights in the cache)
// With mirrored centroids and one token, popcount and tables both wait for memory: .25 and .27.
constexpr int32_t BEST_PATH = PALEY_TABLES;

// S and Q of 16 rows, and their centroids; rows from `out` on are zeros.
void pack_record(const uint8_t* codes, const uint16_t* centroids, int64_t row, int64_t g, const PlanesHeader& header,
                 uint8_t* record) {
  const int64_t columns = int64_t{header.groups} * header.words * 32;
  const int rows = static_cast<int>(std::min<int64_t>(BLOCK, header.out - row));
  for (int r = 0; r < rows; ++r) {
    const uint8_t* from = codes + (row + r) * columns + g * header.words * 32;
    for (int k = 0; k < header.words; ++k) {
      const uint32_t s = plane_word(from + 32 * k, 1), q = plane_word(from + 32 * k, 0);
      std::memcpy(record + k * WORD_BYTES + 4 * r, &s, sizeof s);
      std::memcpy(record + k * WORD_BYTES + 4 * (BLOCK + r), &q, sizeof q);
    }
    for (int k = 0; k < 4; ++k) {
      std::memcpy(record + header.words * WORD_BYTES + 2 * (k * BLOCK + r),
                  centroids + ((row + r) * header.groups + g) * 4 + k, sizeof(uint16_t));
    }
  }
}

// Whether the value of a weight is a sum of one part for each bit, as it is for centroids -b, -a, a, b. In integers:
// float arithmetic would depend on the caller's mode for subnormal numbers.
bool all_mirrored(const uint16_t* centroids, int64_t count) {
  for (int64_t i = 0; i < count; ++i, centroids += 4) {
    int64_t c[4];
    for (int k = 0; k < 4; ++k) c[k] = half_units(centroids[k]);
    if (c[3] - c[2] != c[1] - c[0]) return false;
  }
  return true;
}

}  // namespace
}  // namespace paley

extern "C" int32_t paley_pack_planes(const uint8_t* codes, const uint16_t* centroids, int32_t out, int32_t groups,
                                     int32_t group_size, int64_t bytes, uint8_t* blob) {
  using namespace paley;
  if (!good_shape(out, groups, group_size) || !good_size(bytes, out, groups, group_size)) return PALEY_BAD_ARGUMENT;
  const int words = group_size / 32;
  const int64_t record = record_bytes(words);
  std::memset(blob, 0, bytes);
  const PlanesHeader header{PLANES_MAGIC, out, groups, words, all_mirrored(centroids, int64_t{out} * groups), {}};
  std::memcpy(blob, &header, sizeof header);
  blob += sizeof header;
  for (int64_t row = 0; row < out; row += PANEL) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int b = 0; b < blocks_from(row, out); ++b, blob += record) {
        pack_record(codes, centroids, row + b * BLOCK, g, header, blob);
      }
    }
  }
  return PALEY_OK;
}

extern "C" int32_t paley_planes_matmul(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                                       int64_t tokens, const uint8_t* blob, int64_t bytes, int32_t out,
                                       int32_t groups, int32_t group_size, int32_t path, int32_t level,
                                       int32_t threads, float* y) {
  using namespace paley;
  if (!good_shape(out, groups, group_size) || tokens < 0 || threads < 1) return PALEY_BAD_ARGUMENT;
  if (path < PALEY_AUTO || path > PALEY_TABLES) return PALEY_BAD_ARGUMENT;
  if (level < PALEY_PORTABLE || level > paley_best_planes_level()) return PALEY_BAD_ARGUMENT;
  if (!good_size(bytes, out, groups, group_size)) return PALEY_BAD_ARGUMENT;
  PlanesHeader header;
  std::memcpy(&header, blob, sizeof header);
  if (header.magic != PLANES_MAGIC || header.out != out || header.groups != groups ||
      header.words != group_size / 32 || (header.mirrored != 0 && header.mirrored != 1)) {
    return PALEY_BAD_ARGUMENT;
  }
  if (tokens == 0) return PALEY_OK;
  if (path == PALEY_AUTO) path = BEST_PATH;
  const bool mirrored = header.mirrored != 0;
  blob += sizeof header;
  const PlanesTask task{codes, scales, zeros, tokens, blob, out, groups, header.words, mirrored, path, threads, y};
  try {
#if PALEY_X86
    if (level == PALEY_AVX512) {
      avx512::planes_matmul(task);
      return PALEY_OK;
    }
    if (level == PALEY_AVX2) {
      avx2::planes_matmul(task);
      return PALEY_OK;
    }
#endif
    portable::planes_matmul(task);
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
