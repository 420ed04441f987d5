"""Weight scales and round-to-nearest (used by every method), and the expected error on Gaussian weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paley import kernels
from paley.core.grids import FixedGrid, Grid, as_fixed
from paley.core.metrics import rel_error
from paley.core.rounding import (
    Quantized,
    check_range,
    dynamic_scales,
    mean,
    quantized,
    split_groups,
    stacked,
    storable,
)
from paley.core.schemes import WeightScheme
from paley.core.transforms import Transform
from paley.kernels import scales as kernel
from paley.methods.binary import check_finite, fit_centroids

__all__ = [
    "Error", "gaussian_error", "gaussian_spread", "quantize_nearest", "quantize_turned", "turned_error",
    "turned_parts", "weight_scales",
]  # fmt: skip

_SHRINK_STEPS = 80  # clip ratios 1.00, 0.99, ... 0.21, as in GPTQ's reference runs
_SEARCHED = 2**18  # values whose scales are searched together on a CPU: in groups of 32 the tries take 80 bytes a value
_SEARCHED_AWAY = 2**22  # likewise on other devices
_SAMPLES = 2**17
_CHUNK = 2**20  # values rounded together: a CPU cache holds them, which halves the time
_VECTORS = 2**16
_ROWS, _ROW = 256, 256  # of a sequential grid's sample
_FEW = 48  # values of a group; below it, terms of the order of 1 / group^2 matter


def weight_scales(
    weight: Tensor, scheme: WeightScheme, where: str = "weight", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """weight [out, in] -> scales [out, groups, 1], float16 values, and zeros on affine grids.

    importance [in]: weights of the squared errors, all alike without. "mse" tries 80 clip ratios; in each group the
    one of least error stays. "signed" tries them with either zero. Free grids: [out, groups, stored].
    """
    groups = split_groups(weight.float(), scheme.group_size, where)
    if scheme.by_em:
        return fit_centroids(groups, None, scheme.grid.size, mirrored=scheme.grid.mirrored, where=where), None
    grid = as_fixed(scheme.grid)
    if not scheme.tries_scales:
        rule = "absmax" if scheme.scale_search == "absmax" else "rms"
        return dynamic_scales(groups, grid, rule, 1.0, torch.float16)
    starts = _either_sign if scheme.signed else _absmax
    if importance is not None:
        importance = split_groups(importance.float(), scheme.group_size, where)
    check_finite(groups, importance, where)
    few = max(1, (_SEARCHED if weight.device.type == "cpu" else _SEARCHED_AWAY) // weight.shape[1])
    scales, zeros = zip(*(_least_error(some, grid, starts, importance) for some in groups.split(few)), strict=True)
    return torch.cat(scales), torch.cat(zeros) if grid.affine else None


Starts = Callable[[Tensor, FixedGrid, float], Iterator[tuple[Tensor, Tensor | None]]]


def _absmax(ends: Tensor, grid: FixedGrid, clip_ratio: float) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield dynamic_scales(ends, grid, "absmax", clip_ratio, torch.float16)


def _either_sign(ends: Tensor, grid: FixedGrid, clip_ratio: float) -> Iterator[tuple[Tensor, Tensor | None]]:
    """With each of the two zeros in the middle, the scale that reaches the group's ends."""
    for zero in (grid.size // 2, grid.size // 2 - 1):
        low, high = ends[..., :1] / -zero, ends[..., 1:] / (grid.size - 1 - zero)
        scales = storable(torch.maximum(low, high) * clip_ratio)
        yield scales, torch.full_like(scales, zero)


def _least_error(groups: Tensor, grid: FixedGrid, starts: Starts, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """groups [rows, groups, size] -> the scales and zeros of least error; zeros are 0 on grids that have none."""
    ends = torch.stack(groups.aminmax(dim=-1), -1)  # all that the starts depend on
    tries = [start for step in range(_SHRINK_STEPS) for start in starts(ends, grid, 1 - step / 100)]
    scales = torch.cat([scale for scale, _ in tries], -1)
    zeros = torch.cat([zero for _, zero in tries if zero is not None], -1) if grid.affine else None
    best = _best(groups, grid, scales, zeros, importance)
    return scales.gather(-1, best), scales.new_zeros(best.shape) if zeros is None else zeros.gather(-1, best)


def _best(groups: Tensor, grid: FixedGrid, scales: Tensor, zeros: Tensor | None, importance: Tensor | None) -> Tensor:
    """groups [rows, groups, size], scales, zeros [rows, groups, tries] -> the first of the best [rows, groups, 1]."""
    if isinstance(grid, Grid) and grid.p == 1 and groups.device.type == "cpu" and kernels.backend() == "native":
        return kernel.best(groups, grid, scales, zeros, importance)
    errors = torch.empty_like(scales)
    for k in range(scales.shape[-1]):
        scale, zero = scales[..., k : k + 1], None if zeros is None else zeros[..., k : k + 1]
        points = grid.look_up(grid.quantize(groups, scale, zero)).view_as(groups)
        values = (points if zero is None else points - zero) * scale
        squares = (values - groups).square()
        errors[..., k : k + 1] = mean(squares if importance is None else squares * importance)
    return errors.argmin(-1, keepdim=True)


@functools.lru_cache(maxsize=1024)
def gaussian_error(scheme: WeightScheme, width: int) -> float:
    """t^2 of the scheme on Gaussian rows of `width` columns: ||W - Ŵ||^2 / ||W||^2.

    With scales by rms it tends to the grid's own t^2 as groups grow. It is less in small groups: after scaling, their
    values lie on a sphere, so that none is as long as some groups of independent values are.
    """
    group, samples = scheme.group_size or width, _SAMPLES
    if scheme.scale_search in ("rms", "unbiased"):
        grid = as_fixed(scheme.grid)
        if scheme.method == "gptq":  # gptq refits its scales for least error
            scheme = replace(scheme, scale_search="rms")
        # If p does not divide the group, a vector across two groups lies on no sphere.
        if grid.sequential:
            samples = _SAMPLES
        elif group >= (4 * _FEW if group % grid.p else _FEW):
            return _error_on_sphere(grid, group, stretched=scheme.scale_search == "unbiased")
        else:
            samples = 8 * _SAMPLES
    weight = torch.randn(-(-samples // width), width, generator=torch.Generator().manual_seed(0))
    return rel_error(weight, quantize_nearest(weight, scheme).dequantize())


@functools.lru_cache(maxsize=1024)
def gaussian_spread(grid: FixedGrid) -> float:
    """Standard error of rel_error / `gaussian_error` of a Gaussian weight, times the root of its number of values."""
    if grid.sequential:
        rows = torch.randn(_ROWS, _ROW, generator=torch.Generator().manual_seed(0))
        errors = (grid.look_up(grid.quantize(rows[:, None], rows.new_ones(_ROWS, 1, 1))) - rows).square().mean(1)
        return float(errors.std() / errors.mean()) * _ROW**0.5
    length, error, _ = _moments(grid)
    weights = _weights(length, grid.p, None)
    return float((weights @ error.square() / (weights @ error).square() - 1).sqrt()) * grid.p**0.5


@functools.lru_cache(maxsize=32)  # of 1.5 MB each
def _moments(grid: FixedGrid) -> tuple[Tensor, Tensor, Tensor]:
    """|x|^2, |x - q|^2 and x·(x - q) [vectors], float64, of vectors x and their nearest points q at the best scale.

    x ~ N(0, (p + 2) / p), so that enough vectors are far out, where errors are largest.
    """
    x = torch.randn(_VECTORS, grid.p, generator=torch.Generator().manual_seed(0)) * ((grid.p + 2) / grid.p) ** 0.5
    off = x - grid.round(x / grid.gaussian_scale) * grid.gaussian_scale
    x, off = x.double(), off.double()
    return x.square().sum(1), off.square().sum(1), (x * off).sum(1)


def _weights(length: Tensor, p: int, group: int | None) -> Tensor:
    """Weights [vectors], with sum 1, that turn `_moments` into those of N(0, I_p), or of points of rms 1 on a sphere.

    p of the coordinates of a point on the sphere of `group` dimensions have the density
    (1 - |x|^2 / group)^((group - p - 2) / 2).
    """
    drawn = length * (p / (p + 2) / -2)
    if group is None:
        wanted = length / -2
    else:
        wanted = (1 - length / group).clamp(min=0).log() * ((group - p - 2) / 2)
    return (wanted - drawn).softmax(0)


def _error_on_sphere(grid: FixedGrid, group: int, *, stretched: bool) -> float:
    """Mean |w - ŵ|^2 / |w|^2 for w uniform on a sphere of `group` dimensions with rms 1, as scaled groups are."""
    length, error, short = _moments(grid)
    gaussian, sphere = _weights(length, grid.p, None), _weights(length, grid.p, group)
    # The grid's own t^2 was measured on more vectors than these, which only give the change.
    mse = grid.mse * float(sphere @ error / (gaussian @ error))
    if not stretched:
        return mse
    # With e = |w - q|² and d = w·(w - q), means over the group, the error after `_stretched` is (e - d²) / (1 - d)².
    # Here: its value at the means of e and d over all groups, plus terms of the order of 1 / group for fluctuations.
    along = short - error  # q·(w - q): 0 on average if the points have their best scale
    lost = mse + float(sphere @ along - (gaussian @ along if grid.best_scaled else 0)) / grid.p
    both = torch.stack([short, error, length]) / grid.p
    both = both - (both @ sphere)[:, None]
    covariance = both * sphere @ both.T * (grid.p / group)
    # On a sphere the lengths of a group's vectors add up to `group`.
    covariance = covariance - torch.outer(covariance[2], covariance[2]) / covariance[2, 2]
    left, g = mse - lost**2, 1 / (1 - lost)
    curvature = -2 * g**2 - 8 * lost * g**3 + 6 * left * g**4
    return left * g**2 + curvature / 2 * float(covariance[0, 0]) + 2 * g**3 * float(covariance[0, 1])


def quantize_nearest(weight: Tensor, scheme: WeightScheme, where: str = "weight") -> Quantized:
    """weight [out, in] -> codes [out, in / p], each the nearest point under its group's scale."""
    scales, zeros = weight_scales(weight, scheme, where)
    groups = split_groups(weight.float(), scheme.group_size, where)
    scheme.grid.check_width(weight.shape[1], where)
    codes = scheme.grid.quantize(groups, scales, zeros)
    if scheme.scale_search == "unbiased":
        points = as_fixed(scheme.grid).look_up(codes, weight.shape[1])
        scales = _stretched(groups, points.view_as(groups), scales)
    return quantized(codes, scales, zeros, scheme.grid, weight.shape[1])


def quantize_turned(
    weight: Tensor, scheme: WeightScheme, transform: Transform | None, where: str = "weight"
) -> tuple[Quantized, float]:
    """As `quantize_nearest`, of weight · Tᵀ; and the relative squared error."""
    total = Error()

    def parts() -> Iterator[dict[str, Tensor]]:
        for part, error in turned_parts(weight, scheme, transform, where):
            total.add(error)
            yield {"codes": part.codes, "scales": part.scales} | ({} if part.zeros is None else {"zeros": part.zeros})

    made = stacked(parts(), len(weight))
    width = weight.shape[1] if transform is None else transform.out_dim
    return Quantized(made["codes"], made["scales"], made.get("zeros"), scheme.grid, width), total.relative


def turned_parts(
    weight: Tensor, scheme: WeightScheme, transform: Transform | None, where: str = "weight"
) -> Iterator[tuple[Quantized, Error]]:
    """As `quantize_turned`, a few rows at a time, each with its own error."""
    check_range(weight, scheme.grid, where)
    for rows in _turned(weight, transform):
        part = quantize_nearest(rows, scheme, where)
        yield part, _error(part, rows)


def turned_error(weight: Tensor, q: Quantized, transform: Transform | None) -> float:
    """The relative squared error of `quantize_turned`, of codes that are there already."""
    total, start = Error(), 0
    for rows in _turned(weight, transform):
        some = slice(start, start + len(rows))
        zeros = None if q.zeros is None else q.zeros[some]
        total.add(_error(replace(q, codes=q.codes[some], scales=q.scales[some], zeros=zeros), rows))
        start += len(rows)
    return total.relative


def _turned(weight: Tensor, transform: Transform | None) -> Iterator[Tensor]:
    """weight · Tᵀ, float32, a few rows at a time."""
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        yield (rows.double() if transform is None else transform.apply(rows.double())).float()


def _error(part: Quantized, rows: Tensor) -> Error:
    squared = float(torch.linalg.vector_norm(part.dequantize() - rows)) ** 2
    return Error(squared, float(torch.linalg.vector_norm(rows)) ** 2)


@dataclass
class Error:
    """|W - Ŵ|² and |W|², over all that was added."""

    squared: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        return self.squared / self.norm if self.norm else self.squared

    def add(self, other: Error) -> None:
        self.squared += other.squared
        self.norm += other.norm


def _stretched(groups: Tensor, points: Tensor, scales: Tensor) -> Tensor:
    """groups, points [rows, groups, size] -> scales [rows, groups, 1] with (group · scale points) = |group|^2.

    Points of least error are means of their cells, so that rounded values are shorter: on average (1 - t^2) W. This
    shrinking is the same in all rows, and raises the loss more than noise of the same size.
    """
    along = (groups * points).sum(-1, keepdim=True)
    stretched = groups.square().sum(-1, keepdim=True) / along.clamp(min=1e-30)
    return torch.where((along > 0) & (stretched < 2 * scales), storable(stretched), scales)
