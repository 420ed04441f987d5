"""Rounding to a grid and back: the one place where floats become codes.

The pure-torch code here is the meaning of every faster kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid, FixedGrid, FreeGrid
from paley.core.schemes import ActivationScheme

__all__ = [
    "OUTLIER_GRID",
    "Outliers",
    "Quantized",
    "check_groups",
    "codes_per_row",
    "dequantize",
    "dynamic_scales",
    "fitting_group_size",
    "look_up",
    "nearest_codes",
    "quantize_dynamic",
    "quantized",
    "round_trip",
    "split_groups",
    "storable",
]


OUTLIER_GRID = "int8"


@dataclass(frozen=True)
class Outliers:
    """Input columns int32 [k], ascending, that stay on OUTLIER_GRID: codes uint8 [out, k], scales float16 [out, 1]."""

    columns: Tensor
    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """-> float32 [out, k]."""
        return dequantize(self.codes, self.scales, None, grids.load(OUTLIER_GRID))


@dataclass(frozen=True)
class Quantized:
    """codes [..., ceil(n / p)]; scales [..., n / group_size]; zeros uint8, shaped as scales, on affine grids only.

    Of free grids scales are [..., n / group_size, stored]. columns: n, the values of a row, where the last code of a
    row stands for fewer than p of them. outliers: what the columns named there hold instead of what their codes say.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: str
    columns: int | None = None
    outliers: Outliers | None = None

    @property
    def width(self) -> int:
        """n."""
        return self.codes.shape[-1] * grids.load(self.grid).p if self.columns is None else self.columns

    @property
    def group_size(self) -> int:
        free = isinstance(grids.load(self.grid), FreeGrid)
        return self.width // self.scales.shape[-2 if free else -1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> values [..., n] in `dtype`, computed in float32."""
        values = dequantize(self.codes, self.scales, self.zeros, grids.load(self.grid), self.width)
        if self.outliers is not None:
            values[:, self.outliers.columns.long()] = self.outliers.dequantize()
        return values.to(dtype)


def split_groups(x: Tensor, group_size: int | None, where: str = "rounding") -> Tensor:
    """x [..., n] -> [..., n / group_size, group_size]; None is one group."""
    check_groups(x.shape[-1], group_size, where)
    size = group_size or x.shape[-1]
    return x.unflatten(-1, (x.shape[-1] // size, size))


def check_groups(n: int, group_size: int | None, where: str, *, what: str = "dimension ", way_out: str = "") -> None:
    """Raises unless groups fill n values. what: the error's word for n; way_out: what it adds to the divisors."""
    if group_size is not None and n % group_size:
        below, above = ([d for d in _divisors(n) if (d < group_size) == less] for less in (True, False))
        near = " or ".join(str(d) for d in (*below[-1:], *above[:1]) if d > 1 or n == 1)
        raise PaleyError(
            f"{where}: {what}{n} is no multiple of group_size={group_size}; set a divisor such as {near}{way_out}"
        )


def fitting_group_size(n: int, group_size: int) -> int:
    """The divisor of n nearest to group_size, the larger of two and none below half of it; n itself where n is less."""
    return min((d for d in _divisors(n) if 2 * d >= group_size), key=lambda d: (abs(d - group_size), -d), default=n)


def _divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d < n]


def codes_per_row(n: int, p: int) -> int:
    """Codes of a row of n values: vectors of p run across groups, and the last one is filled up with zeros."""
    return -(-n // p)


def _vectors(groups: Tensor, scales: Tensor, zeros: Tensor | None, p: int) -> Tensor:
    """groups [..., g, k], scales and zeros [..., g, 1] -> a copy at the grid's scale [..., ceil(g * k / p), p]."""
    y = groups / scales
    if zeros is not None:
        y += zeros
    y = y.flatten(-2)
    n = y.shape[-1]
    if n % p:
        y = torch.nn.functional.pad(y, (0, p - n % p))
    return y.unflatten(-1, (codes_per_row(n, p), p))


def nearest_codes(groups: Tensor, scales: Tensor, zeros: Tensor | None, grid: AnyGrid) -> Tensor:
    """groups [..., g, k], scales and zeros [..., g, 1] -> codes [..., ceil(g * k / p)] of the nearest points.

    scales of free grids: [..., g, stored].
    """
    if isinstance(grid, FreeGrid):
        return grid.nearest(groups, scales).flatten(-2)
    vectors = _vectors(groups, scales, zeros, grid.p)
    return grid.nearest(vectors.flatten(0, -2)).view(vectors.shape[:-1])


def look_up(grid: FixedGrid, codes: Tensor, n: int | None = None) -> Tensor:
    """codes [..., c] -> their points, float32 [..., n]; n: c * p unless given."""
    values = grid.decode(codes).flatten(-2)
    return values if n is None else values[..., :n]


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: AnyGrid, n: int | None = None) -> Tensor:
    """codes [..., c], scales and zeros [..., g] -> float32 [..., n]; n: c * p unless given.

    scales of free grids: [..., g, stored].
    """
    if isinstance(grid, FreeGrid):
        return grid.decode(codes.unflatten(-1, (scales.shape[-2], -1)), scales).flatten(-2)
    values = look_up(grid, codes, n).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        values = values - zeros.float()[..., None]
    return (values * scales.float()[..., None]).flatten(-2)


def dynamic_scales(
    groups: Tensor, grid: FixedGrid, scale: str, clip_ratio: float, dtype: torch.dtype = torch.float32
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
    grid = grids.fixed(scheme.grid)
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    return quantized(nearest_codes(groups, scales, zeros, grid), scales, zeros, grid, x.shape[-1], scale_dtype)


def quantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: AnyGrid,
    columns: int,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """codes [..., c], scales [..., g, 1 or stored], zeros [..., g, 1] as the functions here have them -> as stored."""
    return Quantized(
        codes,
        (scales if isinstance(grid, FreeGrid) else scales.squeeze(-1)).to(scale_dtype),
        None if zeros is None else zeros.squeeze(-1).to(torch.uint8),
        grid.name,
        columns,
    )


def round_trip(x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., n] -> what `quantize_dynamic` and `dequantize` leave of it, bit for bit, in x's dtype.

    With scheme.refit it is the line of least squares through the codes instead, whose numbers have no stored form.
    """
    grid = grids.fixed(scheme.grid)
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    vectors = _vectors(groups, scales, zeros, grid.p)
    values = grid.round(vectors.flatten(0, -2)).view_as(vectors).flatten(-2)[..., : x.shape[-1]]
    values = values.unflatten(-1, groups.shape[-2:])
    if scheme.refit:
        return _on_fitted_line(values, groups).flatten(-2).to(x.dtype)
    if zeros is not None:
        values -= zeros
    return values.mul_(scales).flatten(-2).to(x.dtype)


def _on_fitted_line(points: Tensor, groups: Tensor) -> Tensor:
    """points, groups [..., g, k] -> a * points + b, a and b of each group those of least squares."""
    mean = groups.mean(-1, keepdim=True)
    around, points = groups - mean, points - points.mean(-1, keepdim=True)
    slope = (points * around).sum(-1, keepdim=True) / points.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return points * slope + mean
