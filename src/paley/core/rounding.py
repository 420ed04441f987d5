"""Rounding to a grid and back: the one place where floats become codes.

The pure-torch code here is the meaning of every faster kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.core.schemes import ActivationScheme

__all__ = [
    "Quantized",
    "dequantize",
    "dynamic_scales",
    "look_up",
    "nearest_codes",
    "quantize_dynamic",
    "round_trip",
    "split_groups",
    "storable",
]

_FEW = 16  # comparing with each edge beats a binary search up to about here


@dataclass(frozen=True)
class Quantized:
    """codes uint8 [..., n]; scales [..., n / group_size]; zeros uint8, shaped as scales, on affine grids only."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: str

    @property
    def group_size(self) -> int:
        return self.codes.shape[-1] // self.scales.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> values [..., n] in `dtype`, computed in float32."""
        return dequantize(self.codes, self.scales, self.zeros, grids.load(self.grid)).to(dtype)


def split_groups(x: Tensor, group_size: int | None, where: str = "rounding") -> Tensor:
    """x [..., n] -> [..., n / group_size, group_size]; None is one group."""
    n = x.shape[-1]
    size = group_size or n
    if n % size:
        raise PaleyError(f"{where}: dimension {n} is not a multiple of group_size={size}; use a divisor or expand")
    return x.unflatten(-1, (n // size, size))


def _nearest_index(x: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """x [..., g, k], scales and zeros [..., g, 1] -> indices of the nearest points, as float where it is cheaper."""
    y = x / scales
    if zeros is not None:
        y += zeros
    if grid.step is not None:
        return y.sub_(float(grid.points[0])).div_(grid.step).round_().clamp_(0, len(grid.points) - 1)
    edges = grid.edges.to(y)
    if len(edges) > _FEW:
        return torch.bucketize(y.contiguous(), edges, out_int32=True)
    index = torch.zeros_like(y, dtype=torch.uint8)
    for edge in edges.tolist():
        index += (y > edge).view(torch.uint8)  # adding bools themselves takes twice as long
    return index


def nearest_codes(x: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """x [..., g, k], scales and zeros [..., g, 1] -> codes uint8 [..., g, k] of the nearest points."""
    return _nearest_index(x, scales, zeros, grid).to(torch.uint8)


def look_up(grid: Grid, codes: Tensor) -> Tensor:
    """codes, integers of any shape -> their points, float32."""
    points = grid.points[:, 0].to(device=codes.device, dtype=torch.float32)
    return points.index_select(0, codes.flatten().int()).view(codes.shape)  # ten times faster than points[codes]


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """codes [..., n], scales and zeros [..., g] -> float32 [..., n]."""
    values = look_up(grid, codes).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        values = values - zeros.float()[..., None]
    return (values * scales.float()[..., None]).flatten(-2)


def dynamic_scales(
    groups: Tensor, grid: Grid, scale: str, clip_ratio: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """groups [..., g, k] -> scales [..., g, 1] as stored in `dtype`, and zeros [..., g, 1] on affine grids."""
    zeros = None
    if grid.affine:
        low = groups.amin(-1, keepdim=True).clamp(max=0) * clip_ratio
        high = groups.amax(-1, keepdim=True).clamp(min=0) * clip_ratio
        scales = (high - low) / grid.peak
    elif scale == "absmax":
        low = None
        scales = groups.abs().amax(-1, keepdim=True) * (clip_ratio / grid.peak)
    else:
        low = None
        scales = groups.square().mean(-1, keepdim=True).sqrt() * (clip_ratio * grid.gaussian_scale)
    scales = storable(scales, dtype)
    if low is not None:
        zeros = torch.round(-low / scales).clamp_(0, grid.peak)
    return scales, zeros


def storable(scales: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """scales -> what `dtype` can hold of them, as float32, never 0 (a group of zeros stays exact at any scale)."""
    info = torch.finfo(dtype)
    smallest = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    return scales.float().clamp(min=smallest, max=info.max).to(dtype).float()


def quantize_dynamic(x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float16) -> Quantized:
    """x [..., n] -> codes and scales of each token (or token and group), for storing."""
    grid = grids.load(scheme.grid)
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    codes = nearest_codes(groups, scales, zeros, grid).flatten(-2)
    return Quantized(
        codes,
        scales.squeeze(-1).to(scale_dtype),
        None if zeros is None else zeros.squeeze(-1).to(torch.uint8),
        scheme.grid,
    )


def round_trip(x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., n] -> what `quantize_dynamic` and `dequantize` leave of it, bit for bit, in x's dtype."""
    grid = grids.load(scheme.grid)
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    index = _nearest_index(groups, scales, zeros, grid)
    if grid.step is not None:  # an evenly spaced grid needs no table
        values = index.mul_(grid.step).add_(float(grid.points[0]))
    else:
        values = look_up(grid, index)
    if zeros is not None:
        values -= zeros
    return values.mul_(scales).flatten(-2).to(x.dtype)
