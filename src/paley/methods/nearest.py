"""Scales for weights, and rounding to nearest: what every other weight method starts from."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from paley.core import grids
from paley.core.grids import FixedGrid, FreeGrid
from paley.core.metrics import rel_error
from paley.core.rounding import Quantized, dynamic_scales, look_up, nearest_codes, quantized, split_groups, storable
from paley.core.schemes import WeightScheme
from paley.methods.binary import fit_centroids

__all__ = ["gaussian_error", "quantize_nearest", "weight_scales"]

_SHRINK_STEPS = 80  # clip ratios 1.00, 0.99, ... 0.21, as in GPTQ's reference runs
_ERROR_POWER = 2.4
_SAMPLES = 2**17


def weight_scales(weight: Tensor, scheme: WeightScheme, where: str = "weight") -> tuple[Tensor, Tensor | None]:
    """weight [out, in] -> scales [out, groups, 1] as float16 can hold them, and zeros where the grid has them.

    "mse" keeps, of 80 clip ratios, the one of least sum |error|^2.4 in each group. Free grids: [out, groups, stored].
    """
    grid = grids.load(scheme.grid)
    groups = split_groups(weight.float(), scheme.group_size, where)
    if isinstance(grid, FreeGrid):
        return fit_centroids(groups, None, grid.size, mirrored=grid.mirrored, where=where), None
    if scheme.scale_search != "mse":
        rule = "absmax" if scheme.scale_search == "absmax" else "rms"
        return dynamic_scales(groups, grid, rule, 1.0, torch.float16)
    scales, zeros = _least_error(groups, grid)
    return scales, zeros if grid.affine else None


def _least_error(groups: Tensor, grid: FixedGrid) -> tuple[Tensor, Tensor]:
    """groups [rows, groups, size] -> the scales and zeros of least error; zeros are 0 on grids without any."""
    best_error = groups.new_full((*groups.shape[:2], 1), torch.inf)
    best_scales, best_zeros = torch.zeros_like(best_error), torch.zeros_like(best_error)
    for step in range(_SHRINK_STEPS):
        scales, zeros = dynamic_scales(groups, grid, "absmax", 1 - step / 100, torch.float16)
        codes = nearest_codes(groups, scales, zeros, grid)
        points = look_up(grid, codes).view_as(groups)
        values = (points if zeros is None else points - zeros) * scales
        error = (values - groups).abs().pow(_ERROR_POWER).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        if zeros is not None:
            best_zeros = torch.where(better, zeros, best_zeros)
    return storable(best_scales), best_zeros


@functools.lru_cache(maxsize=1024)
def gaussian_error(scheme: WeightScheme, width: int) -> float:
    """t^2 of the scheme on Gaussian rows of so many columns: ||W - Ŵ||^2 / ||W||^2, the same for every such layer."""
    grid = grids.load(scheme.grid)
    if scheme.scale_search in ("rms", "unbiased") and not isinstance(grid, FreeGrid):
        least = scheme.scale_search == "rms" or scheme.method == "gptq"
        return grid.mse if least else grid.mse / (1 - grid.mse)
    weight = torch.randn(-(-_SAMPLES // width), width, generator=torch.Generator().manual_seed(0))
    return rel_error(weight, quantize_nearest(weight, scheme).dequantize())


def quantize_nearest(weight: Tensor, scheme: WeightScheme, where: str = "weight") -> Quantized:
    """weight [out, in] -> codes [out, in / p], each the nearest point under its group's scale."""
    grid = grids.load(scheme.grid)
    scales, zeros = weight_scales(weight, scheme, where)
    groups = split_groups(weight.float(), scheme.group_size, where)
    codes = nearest_codes(groups, scales, zeros, grid)
    if scheme.scale_search == "unbiased" and not isinstance(grid, FreeGrid):
        scales = _stretched(groups, look_up(grid, codes, weight.shape[1]).view_as(groups), scales)
    return quantized(codes, scales, zeros, grid, weight.shape[1])


def _stretched(groups: Tensor, points: Tensor, scales: Tensor) -> Tensor:
    """groups, points [rows, groups, size] -> the scales [rows, groups, 1] that give each group its length along itself.

    Points of least error are means of their cells, so what is rounded to them is shorter: on average (1 - t^2) W. That
    error is the same in all rows, and costs more than noise of its size.
    """
    along = (groups * points).sum(-1, keepdim=True)
    found = groups.square().sum(-1, keepdim=True) / along.clamp(min=1e-30)
    return torch.where((along > 0) & (found < 2 * scales), storable(found), scales)
