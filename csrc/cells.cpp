// A point that scores below another one everywhere in a cell is not its member. Sides are cut one after the other, so
// that each cut has few points left to look at. A cell is taken a little larger than it is, and a point counts as
// lower only by a margin: rounding never loses a member.
#include "cells.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "paley.h"

namespace {

constexpr double SLACK = 1e-4;  // of a cell's width, which cell_of may be wrong by
constexpr double MARGIN = 1e-9;

struct Cells {
  const paley_table& table;
  std::vector<double> points, half_square;  // [n, p], [n]
  double margin = 0;
  std::vector<double> low, high, centre;  // of the box at hand
  std::vector<int32_t> starts;
  std::vector<uint16_t> members;

  explicit Cells(const paley_table& table)
      : table(table),
        points(table.points, table.points + static_cast<size_t>(table.n) * table.p),
        half_square(table.n),
        low(table.low, table.low + table.p),
        high(table.p),
        centre(table.p) {
    for (int32_t j = 0; j < table.n; ++j) {
      for (int32_t i = 0; i < table.p; ++i) half_square[j] += at(j, i) * at(j, i) / 2;
      margin = std::max(margin, MARGIN * half_square[j]);
    }
    for (int32_t i = 0; i < table.p; ++i) {
      high[i] = low[i] + static_cast<double>(table.width[i]) * table.parts;
      centre[i] = (low[i] + high[i]) / 2;
    }
  }

  double at(int32_t point, int32_t i) const { return points[static_cast<size_t>(point) * table.p + i]; }

  std::vector<uint16_t> pruned(const std::vector<uint16_t>& list) const {
    int32_t rival = list[0];
    double best = -INFINITY;
    for (const uint16_t j : list) {
      double score = -half_square[j];
      for (int32_t i = 0; i < table.p; ++i) score += centre[i] * at(j, i);
      if (score > best) {
        best = score;
        rival = j;
      }
    }
    std::vector<uint16_t> kept;
    for (const uint16_t j : list) {
      double lead = half_square[rival] - half_square[j];  // the most that j can be ahead of the rival by
      for (int32_t i = 0; i < table.p; ++i) {
        const double d = at(j, i) - at(rival, i);
        lead += d * (d > 0 ? high[i] : low[i]);
      }
      if (!(lead < -margin)) kept.push_back(j);
    }
    return kept;
  }

  void cut(const std::vector<uint16_t>& list, int32_t side) {
    if (side == table.p) {
      members.insert(members.end(), list.begin(), list.end());
      starts.push_back(static_cast<int32_t>(members.size()));
      return;
    }
    const double width = table.width[side], first = table.low[side];
    const double before[] = {low[side], high[side], centre[side]};
    for (int32_t k = 0; k < table.parts; ++k) {
      low[side] = first + (k - SLACK) * width;
      high[side] = first + (k + 1 + SLACK) * width;
      centre[side] = first + (k + 0.5) * width;
      cut(pruned(list), side + 1);
    }
    low[side] = before[0], high[side] = before[1], centre[side] = before[2];
  }
};

}  // namespace

extern "C" int32_t paley_cells(const paley_table* table, int64_t capacity, double* bias, int32_t* starts,
                               uint16_t* members, int64_t* count) {
  if (table->n < 1 || table->n > 65536 || table->p < 2 || table->p > 4 || table->parts < 1 || table->parts > 4096) {
    return PALEY_BAD_ARGUMENT;
  }
  for (int32_t i = 0; i < table->p; ++i) {
    if (!std::isfinite(table->low[i]) || !std::isfinite(table->width[i]) || !(table->width[i] > 0)) {
      return PALEY_BAD_ARGUMENT;
    }
  }
  try {
    Cells cells(*table);
    std::vector<uint16_t> all(table->n);
    for (int32_t j = 0; j < table->n; ++j) all[j] = static_cast<uint16_t>(j);
    cells.starts.push_back(0);
    cells.cut(all, 0);
    *count = static_cast<int64_t>(cells.members.size());
    if (*count > capacity) return PALEY_OK;  // the caller comes again with more room
    std::copy(cells.starts.begin(), cells.starts.end(), starts);
    std::copy(cells.members.begin(), cells.members.end(), members);
    for (int32_t j = 0; j < table->n; ++j) bias[j] = -cells.half_square[j];
    return PALEY_OK;
  } catch (const std::bad_alloc&) {
    return PALEY_OUT_OF_MEMORY;
  } catch (...) {
    return PALEY_INTERNAL;
  }
}
