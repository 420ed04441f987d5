"""Rounding to a grid and back: the one place where floats become codes.

Every faster kernel must agree with the torch code here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid, FixedGrid
from paley.core.plain_grids import AnyGridField
from paley.core.schemes import ActivationScheme

__all__ = [
    "OUTLIER_GRID",
    "Outliers",
    "Quantized",
    "check_groups",
    "check_range",
    "codes_per_row",
    "dynamic_scales",
    "fitting_group_size",
    "joined",
    "mean",
    "quantize_dynamic",
    "quantized",
    "round_trip",
    "split_groups",
    "stacked",
    "storable",
]

_COARSE = 2.0**-20  # float16 has steps of 2^-24 there
_AT_ONCE = 2**20  # values of a weight
_LOST = 1e-3  # of a weight's energy
OUTLIER_GRID = "int8"


@dataclass(frozen=True)
class Outliers:
    """Input columns int32 [k], ascending, that stay on OUTLIER_GRID: codes uint8 [out, k], scales float16 [out, 1]."""

    columns: Tensor
    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """-> float32 [out, k]."""
        return grids.load(OUTLIER_GRID).dequantize(self.codes, self.scales)


@dataclass(frozen=True)
class Quantized:
    """codes [..., ceil(n / p)]; scales [..., n / group_size, *grid.scale_shape]; zeros uint8, on affine grids only.

    grid: a grid, or the name of a packaged one. columns: n, the values of a row; needed if the last code of a row holds
    fewer than p of them. outliers: the values of the columns named there, which replace those of the codes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: AnyGridField
    columns: int | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", grids.as_grid(self.grid))

    @property
    def width(self) -> int:
        """n."""
        return self.codes.shape[-1] * self.grid.p if self.columns is None else self.columns

    @property
    def group_size(self) -> int:
        return self.width // self.scales.shape[-1 - len(self.grid.scale_shape)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> values [..., n] in `dtype`, computed in float32."""
        values = self.grid.dequantize(self.codes, self.scales, self.zeros, self.width)
        if self.outliers is not None:
            values[:, self.outliers.columns.long()] = self.outliers.dequantize()
        return values.to(dtype)


def split_groups(x: Tensor, group_size: int | None, where: str = "rounding") -> Tensor:
    """x [..., n] -> [..., n / group_size, group_size]; None is one group."""
    check_groups(x.shape[-1], group_size, where)
    size = group_size or x.shape[-1]
    return x.unflatten(-1, (x.shape[-1] // size, size))


def check_groups(n: int, group_size: int | None, where: str, *, what: str = "dimension ", way_out: str = "") -> None:
    """Raises unless groups fill n values. what: the name of n in the error; way_out: ends the error."""
    if group_size is not None and n % group_size:
        below, above = ([d for d in _divisors(n) if (d < group_size) == less] for less in (True, False))
        near = " or ".join(str(d) for d in (*below[-1:], *above[:1]) if d > 1 or n == 1)
        raise PaleyError(
            f"{where}: {what}{n} is no multiple of group_size={group_size}; set a divisor such as {near}{way_out}"
        )


def fitting_group_size(n: int, group_size: int) -> int:
    """The divisor of n nearest to group_size, the larger of two and none below half of it; n if n is less."""
    return min((d for d in _divisors(n) if 2 * d >= group_size), key=lambda d: (abs(d - group_size), -d), default=n)


def _divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d < n]


def codes_per_row(n: int, p: int) -> int:
    """Codes of a row of n values. Vectors of p values run across groups; the last one is padded with zeros."""
    return -(-n // p)


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
        # Some libraries' float32 roots are not the nearest floats.
        scales = mean(groups.square()).double().sqrt().float() * (clip_ratio * grid.gaussian_scale)
    scales = storable(scales, dtype)
    if low is not None:
        zeros = torch.round(-low / scales).clamp_(0, grid.peak)
    return scales, zeros


def mean(x: Tensor) -> Tensor:
    """x [..., k] -> [..., 1], summed by halves: the same bits whatever the machine. Writes to x."""
    k = n = x.shape[-1]
    while n > 1:
        x[..., : n // 2] += x[..., n - n // 2 : n]
        n -= n // 2
    return x[..., :1] / k


def storable(scales: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """scales -> their values in `dtype`, as float32, never 0 (a group of zeros is exact at any scale)."""
    info = torch.finfo(dtype)
    smallest = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    return scales.float().clamp(min=smallest, max=info.max).to(dtype).float()


def check_range(weight: Tensor, grid: AnyGrid, where: str) -> None:
    """Raises for a weight [out, in] whose rows float16 scales cannot hold: too large, or too small for its energy.

    A small part of the energy may be lost: rows that are as good as zero occur in real models.
    """
    # Room for the results first: between copies of parts they would keep the heap from being used again.
    largest, energy = torch.empty(2, len(weight), dtype=torch.float64)
    step = max(1, _AT_ONCE // weight.shape[1])
    for at, part in zip(range(0, len(weight), step), weight.split(step), strict=True):
        here = slice(at, at + len(part))
        largest[here] = torch.stack(part.aminmax(dim=1)).abs().amax(0)
        energy[here] = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square()
    scales = largest / getattr(grid, "peak", 1.0)  # what a row needs if nothing is clipped; free grids store values
    lost = float(energy[(scales < _COARSE) & (scales > 0)].sum() / energy.sum().clamp(min=1e-300))
    if float(scales.max()) > torch.finfo(torch.float16).max or lost > _LOST:
        raise PaleyError(
            f"{where}: its values reach {float(largest.max()):.3g}, and float16 has no room for its scales; "
            "take a power of two out of the rows and into the weights that read them, or keep this layer unquantized"
        )


def quantize_dynamic(x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float16) -> Quantized:
    """x [..., n] -> codes and scales of each token (or token and group), as stored."""
    grid = scheme.grid
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    return quantized(grid.quantize(groups, scales, zeros), scales, zeros, grid, x.shape[-1], scale_dtype)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """The rows of all parts, one below the other; the parts are of one grid, width and set of outlier columns."""

    def together(of: Callable[[Any], Tensor | None]) -> Any:
        tensors = [tensor for part in parts if (tensor := of(part)) is not None]
        return torch.cat(tensors) if tensors else None

    first, outliers = parts[0], parts[0].outliers
    if len(parts) == 1:
        return first
    if outliers is not None:
        codes, scales = together(lambda part: part.outliers.codes), together(lambda part: part.outliers.scales)
        outliers = Outliers(outliers.columns, codes, scales)
    codes, scales, zeros = (together(attrgetter(name)) for name in ("codes", "scales", "zeros"))
    return Quantized(codes, scales, zeros, first.grid, first.columns, outliers)


def stacked(parts: Iterable[Mapping[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """Tensors of the same names, below those of the part before, `rows` in all; one part is in memory at a time."""
    whole, at = dict[str, Tensor](), 0
    for part in parts:
        count = {len(tensor) for tensor in part.values()}.pop()
        for name, tensor in part.items():
            if name not in whole:
                whole[name] = tensor.new_empty(rows, *tensor.shape[1:])
            whole[name][at : at + count] = tensor
        at += count
    assert at == rows
    return whole


def quantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: AnyGrid,
    columns: int,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """codes [..., c], scales [..., g, *scale_shape or 1], zeros [..., g, 1], as computed -> as stored."""
    return Quantized(
        codes,
        scales.reshape(*scales.shape[:-1], *grid.scale_shape).to(scale_dtype),
        None if zeros is None else zeros.squeeze(-1).to(torch.uint8),
        grid,
        columns,
    )


def round_trip(x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., n] -> what `quantize_dynamic` and then `dequantize` give, bit for bit, in x's dtype.

    With scheme.refit, each group is instead the least-squares line through its codes, which has no stored form.
    """
    grid = scheme.grid
    groups = split_groups(x.float(), scheme.group_size)
    scales, zeros = dynamic_scales(groups, grid, scheme.scale, scheme.clip_ratio, scale_dtype)
    vectors = grid.vectors(groups, scales, zeros)
    values = grid.round(vectors.flatten(0, -2)).view_as(vectors).flatten(-2)[..., : x.shape[-1]]
    values = values.unflatten(-1, groups.shape[-2:])
    if scheme.refit:
        return _on_fitted_line(values, groups).flatten(-2).to(x.dtype)
    if zeros is not None:
        values -= zeros
    return values.mul_(scales).flatten(-2).to(x.dtype)


def _on_fitted_line(points: Tensor, groups: Tensor) -> Tensor:
    """points, groups [..., g, k] -> a * points + b, with a and b fitted to each group by least squares."""
    middle = mean(groups.clone())
    around, points = groups - middle, points - mean(points.clone())
    slope = mean(points * around) / mean(points.square()).clamp(min=1e-30)
    return points * slope + middle
