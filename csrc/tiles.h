// The tiles of AMX: what a thread says of their shapes before it uses them.
#pragma once

#include <stdint.h>

namespace paley {

// Of each of 8 tiles, rows of so many bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// The processor keeps shapes for each thread. Not by _tile_loadconfig: GCC 12 has it read 8 bytes only.
template <const TileShapes& SHAPES>
struct TileSession {
  TileSession() { __asm__ volatile("ldtilecfg %0" : : "m"(SHAPES)); }
  ~TileSession() { __asm__ volatile("tilerelease"); }
};

}  // namespace paley
