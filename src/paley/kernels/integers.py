"""The integers of 8 or 13 bits that stand for a grid's points as the native kernels multiply (`kernels.matmul`)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from paley.core.grids import FreeGrid, Grid
from paley.core.rounding import Quantized
from paley.core.trellis import TrellisGrid
from paley.kernels.stored import StoredWeight

__all__ = ["LIMITS", "coded", "integers"]

LIMITS = (127, 4095)  # of integers: 8 bits, fine
_PROBES = 2**14


@functools.lru_cache(maxsize=128)
def integers(grid: Grid, limit: int) -> tuple[Tensor, float, float]:
    """-> points int16 [n, p] within ±limit, their scale, and their error relative to a Gaussian's rms."""
    points = grid.points.double()
    whole = points.round()
    if torch.equal(whole, points) and -limit - 1 <= float(points.min()) and float(points.max()) <= limit:
        return whole.short(), 1.0, 0.0
    x = torch.randn(_PROBES, grid.p, generator=torch.Generator().manual_seed(0))
    unit = 1.0 if grid.unit or grid.p > 1 else grid.gaussian_scale
    often = grid.nearest(x / unit).long().bincount(minlength=grid.size).double()[:, None]
    best, reach = (math.inf, 1.0), float(points.abs().max())
    for tried in range(64):
        scale = reach / (limit - tried * limit / 256)
        whole = (points / scale).round()
        error = float((often * (whole * scale - points).square()).sum())
        best = min(best, (error, scale))
    error, scale = best
    return (points / scale).round().short(), scale, unit * math.sqrt(error / (_PROBES * grid.p))


def coded(q: Quantized | StoredWeight, kind: str, *, fine: bool) -> tuple[Tensor, Tensor, float, Tensor, Tensor | None]:
    """A weight as a `Plan` of this kind has it.

    -> table int16 [n, p], codes, packed or not, its scale, scales [out, groups], own points int8 [.., groups, 4].
    """
    limit = LIMITS[fine]
    empty = torch.zeros(1, 1, dtype=torch.int16)
    grid, codes = q.grid, q.codes
    if kind.startswith("trellis"):
        assert isinstance(grid, TrellisGrid)
        return grid.codebook.lists().short()[:, None], codes, grid.step_size, q.scales, None
    if isinstance(grid, FreeGrid):
        points = grid.group_points(q.scales.float())
        scales = (points.abs().amax(-1) / limit).half().clamp(min=2.0**-24)
        whole = (points / scales.float()[..., None]).round().clamp(-limit, limit).to(torch.int8)
        if kind == "own2":
            return empty, codes, 1.0, scales, torch.nn.functional.pad(whole, (0, 4 - grid.size)).contiguous()
        whole = whole.gather(-1, codes.unflatten(-1, (whole.shape[1], -1)).long()).flatten(1)
        return *_listed(whole, kind, fine), 1.0, scales, None
    if isinstance(grid, Grid):
        table, scale, _ = integers(grid, limit)
        if kind not in ("bytes", "words") or isinstance(q, StoredWeight):
            return table.contiguous(), codes, scale, q.scales, None
        whole = table.int()[codes.long()].flatten(1)[:, : q.width]
    else:
        values = grid.look_up(codes, q.width)
        exact = isinstance(grid, TrellisGrid)
        scale = grid.step_size if exact else float(values.abs().max()) / limit or 1.0
        whole = (values / scale).round().int()
    return *_listed(whole, kind, fine), scale, q.scales, None


def _listed(values: Tensor, kind: str, fine: bool) -> tuple[Tensor, Tensor]:
    """Integers -> a table of all that a plain kind holds, int16 [n, 1], and where they are in it."""
    low, high = (-LIMITS[fine], LIMITS[fine]) if kind == "words" or not fine else (-128, 127)
    return torch.arange(low, high + 1, dtype=torch.int16)[:, None], values.int() - low
