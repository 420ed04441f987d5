"""A few centroids per group of a row, by expectation-maximisation: the weights of W(1+1)A(1x4).

This is a reconstruction from the abstract of arXiv:2504.05352; the full paper was not available. A sign bit and a group
bit choose one of four centroids of the group. Each centroid is the mean of its weights, weighted by the Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["check_finite", "fit_centroids"]

_MIN_SIZE, _MAX_SIZE = 2, 16
_BLOCK = 2**18  # values at a time: about ten float64 copies of them exist, and should fit the cache
_SPREAD = 1.4  # Lloyd-Max points of N(0, 1) over its even quantiles: 1.2 for 2 points, 1.3-1.4 for 4, √3 for many
_MAGNITUDE = 0x7FFFFFFF  # flipped if the sign is set, the bits of a float32 are in its order


class _Sorted(NamedTuple):
    """n groups of k values, float64, with sums up to each place: the sum of a run of neighbours takes two look-ups.

    Values of importance 0 are replaced by the group's largest other value, with weight 0.
    """

    values: Tensor  # [n, k] ascending
    weight: Tensor  # [n, k] the importance of each, at most 1
    mass: Tensor  # [n, k + 1] the sum of weight before each place
    moment: Tensor  # [n, k + 1] the sum of weight * values

    def take(self, groups: Tensor) -> _Sorted:
        """groups: indices, or a mask [n]."""
        return _Sorted(*(x[groups] for x in self))


def fit_centroids(
    values: Tensor,
    importance: Tensor | None,
    size: int,
    *,
    mirrored: bool = False,
    rounds: int = 20,
    where: str = "weight",
) -> Tensor:
    """values [rows, groups, k] -> float32 [rows, groups, size]: ascending points of small sum h (w - nearest)^2.

    importance: h >= 0, broadcastable to values; None is 1. mirrored: the points are -s and s, and the scales
    s [rows, groups, size / 2] are returned. All are finite float16 values, rounded once at the end; no earlier round
    raises the error. Exact for at most `size` different values of positive importance; 0 if there are none.
    """
    _check(values, importance, size, mirrored, rounds, where)
    count = size // 2 if mirrored else size
    if not values.numel():
        return values.new_zeros(*values.shape[:2], count, dtype=torch.float32)
    weight = values.new_ones(()) if importance is None else importance.to(values.device)
    rows = max(1, _BLOCK // values[0].numel())
    parts = zip(values.split(rows), weight.expand(values.shape).split(rows), strict=True)
    return torch.cat([_fit(v, h, count, mirrored, rounds) for v, h in parts])


def _fit(values: Tensor, importance: Tensor, count: int, mirrored: bool, rounds: int) -> Tensor:
    """values, importance [rows, groups, k] -> points [rows, groups, count]; if mirrored, the s of ±s."""
    values = values.float().abs() if mirrored else values.float()  # the nearest of ±s is sign(w) times that of |w|
    groups = _sort(values.flatten(0, 1), importance.flatten(0, 1))
    first, second = (_last(_rounds(groups, start, rounds)) for start in _starts(groups, count, mirrored))
    points = torch.where(_gain(groups, second) > _gain(groups, first), second, first)
    limit = torch.finfo(torch.float16).max
    return points.clamp(-limit, limit).half().float().unflatten(0, values.shape[:2])


def _last(rounds: Iterator[Tensor]) -> Tensor:
    *_, points = rounds
    return points


def _sort(values: Tensor, importance: Tensor) -> _Sorted:
    """values, importance [n, k] -> the groups that EM works on."""
    counts = importance > 0
    last = values.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
    last = torch.where(last.isfinite(), last, 0)  # no value has importance: a group of zeros
    bits = torch.where(counts, values, torch.inf).view(torch.int32)
    bits, order = (bits ^ (bits >> 31 & _MAGNITUDE)).sort(dim=-1, stable=True)  # integers are sorted faster
    ordered = (bits ^ (bits >> 31 & _MAGNITUDE)).view(torch.float32).minimum(last).double()
    weight = importance.double()
    weight = (weight / weight.amax(-1, keepdim=True)).nan_to_num_(0).gather(-1, order)
    mass, moment = (torch.nn.functional.pad(x.cumsum(-1), (1, 0)) for x in (weight, weight * ordered))
    return _Sorted(ordered, weight, mass, moment)


def _starts(groups: _Sorted, count: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """-> two sets of points [n, count] from which EM starts; which one ends better differs between groups.

    First: weighted quantiles near the Lloyd-Max points of a Gaussian. Second: places as dense as optimal points.
    Error above the least possible for 4 points and 128 values (first, second, better of both): Gaussian 1.8%,
    1.5%, 1.0%; with log-normal importance (sigma 1) 4.2%, 3.6%, 2.1%; Student's t with 4 degrees of freedom 6.8%, 3.0%,
    2.3%. Unweighted or even quantiles are about as good for 4 points; even ones are far worse for 8.
    """
    even = (torch.arange(count, dtype=torch.float64, device=groups.mass.device) + 0.5) / count
    upper = torch.special.ndtr(_SPREAD * torch.special.ndtri((1 + even) / 2 if mirrored else even))
    # The density of least error is (h * density)^(1/3) (Panter and Dite, 1951); a gap is one over the density.
    spread = ((groups.weight[:, 1:] + groups.weight[:, :-1]) * groups.values.diff().square()) ** (1 / 3)
    return (
        _quantiles(groups.values, groups.mass[:, 1:], 2 * upper - 1 if mirrored else upper),
        _quantiles(groups.values, torch.nn.functional.pad(spread.cumsum(-1), (1, 0)), even),
    )


def _quantiles(values: Tensor, sums: Tensor, at: Tensor) -> Tensor:
    """values, sums [n, k] ascending -> the values [n, count] at which the sums reach the fraction `at` of the total."""
    index = torch.searchsorted(sums.contiguous(), sums[:, -1:] * at)
    return values.gather(-1, index.clamp_(max=values.shape[-1] - 1))


def _rounds(groups: _Sorted, points: Tensor, rounds: int) -> Iterator[Tensor]:
    """points [n, size] ascending -> the points after each round, until they no longer change."""
    moving = torch.arange(len(points), device=points.device)
    for _ in range(rounds):
        old = points[moving]
        new = _means(groups, *_reseed(groups, old, _cells(groups, old)))
        points = points.index_copy(0, moving, new)
        yield points
        changed = (new != old).any(-1)
        left = int(changed.sum())
        if not left:
            return
        if 2 * left < len(moving):  # few groups are left: copying them is worth it
            groups, moving = groups.take(changed), moving[changed]


def _cells(groups: _Sorted, points: Tensor) -> Tensor:
    """points [n, size] -> bounds [n, size + 1]: the values of cell j are those from bounds j to before j + 1."""
    inner = torch.searchsorted(groups.values, (points[:, 1:] + points[:, :-1]) / 2)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=groups.values.shape[-1])


def _gain(groups: _Sorted, points: Tensor) -> Tensor:
    """points [n, size] -> sum h w^2 - sum h (w - nearest)^2 [n, 1]."""
    bounds = _cells(groups, points)
    mass, moment = groups.mass.gather(-1, bounds).diff(), groups.moment.gather(-1, bounds).diff()
    return (points * (2 * moment - points * mass)).sum(-1, keepdim=True)


def _means(groups: _Sorted, points: Tensor, bounds: Tensor) -> Tensor:
    """The weighted mean of each cell; an empty cell keeps its point."""
    mass, moment = groups.mass.gather(-1, bounds).diff(), groups.moment.gather(-1, bounds).diff()
    first = groups.values.gather(-1, bounds[:, :-1].clamp(max=groups.values.shape[-1] - 1))
    final = groups.values.gather(-1, (bounds[:, 1:] - 1).clamp(min=0))
    # Differences of long sums have rounding errors; a mean must not leave its cell because of them.
    means = torch.where(mass > 0, moment / mass, first).clamp(first, final)
    return torch.where(bounds.diff() > 0, means, points)


def _reseed(groups: _Sorted, points: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the points of empty cells, one after another, to the value of largest error in their group."""
    for _ in range(points.shape[-1]):
        rows = (bounds.diff() == 0).any(-1).nonzero().squeeze(-1)
        if not len(rows):
            break
        some, old = groups.take(rows), points[rows]
        nearest = old.gather(-1, torch.searchsorted(((old[:, 1:] + old[:, :-1]) / 2).contiguous(), some.values))
        error, worst = (some.weight * (some.values - nearest).square()).max(-1, keepdim=True)
        if not (error > 0).any():
            break
        empty = (bounds[rows].diff() == 0).to(torch.uint8).argmax(-1, keepdim=True)
        seed = torch.where(error > 0, some.values.gather(-1, worst), old.gather(-1, empty))
        new = old.scatter(-1, empty, seed).sort(-1).values
        points = points.index_copy(0, rows, new)
        bounds = bounds.index_copy(0, rows, _cells(some, new))
    return points, bounds


def _check(values: Tensor, importance: Tensor | None, size: int, mirrored: bool, rounds: int, where: str) -> None:
    if not _MIN_SIZE <= size <= _MAX_SIZE or (mirrored and size % 2):
        kind = "an even number" if mirrored else "a number"
        raise PaleyError(f"{where}: needs {kind} of centroids from {_MIN_SIZE} to {_MAX_SIZE}, got {size}; 4 is usual")
    if rounds < 1:
        raise PaleyError(f"{where}: needs at least one round of EM, got {rounds}; 20 is usual")
    if values.ndim != 3 or not values.shape[-1]:
        raise PaleyError(f"{where}: values must be [rows, groups, k >= 1], got {list(values.shape)}; split into groups")
    check_finite(values, importance, where)
    if importance is None:
        return
    fits = importance.ndim <= 3 and all(
        a in (1, b) for a, b in zip(reversed(importance.shape), reversed(values.shape), strict=False)
    )
    if not fits:
        raise PaleyError(
            f"{where}: importance {list(importance.shape)} does not fit values {list(values.shape)}; give one for each"
            " column of each group"
        )


def check_finite(values: Tensor, importance: Tensor | None, where: str) -> None:
    """Raises PaleyError for values [...] or importances [...], weights of squared errors, that scales cannot be of."""
    if bad := int((~values.isfinite()).sum()):
        raise PaleyError(f"{where}: {bad} of {values.numel()} values are NaN or infinite; repair the checkpoint")
    if importance is not None and (bad := int((~(importance.isfinite() & (importance >= 0))).sum())):
        raise PaleyError(
            f"{where}: {bad} of {importance.numel()} importances are NaN, infinite or negative; damp the Hessian"
        )
