"""Slopes of the linearity theorem: how fast a loss grows with the relative squared error t^2 of each slot.

E loss(all slots perturbed) ~ loss + sum_l alpha_l t_l^2, for noise or rounding alike (HIGGS, arXiv:2411.17525). The
model is behind one callable, so a test of the measurement takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paley.core.defaults import LEVELS
from paley.core.errors import PaleyError

__all__ = [
    "AGREEMENT",
    "LEVELS",
    "Delta",
    "Slope",
    "clamp_slopes",
    "fit_slope",
    "level_order",
    "measure_slopes",
    "noise_levels",
    "rank_shifts",
]

# delta(slot, t, draw): what noise of relative size t in `slot` adds to the loss; `draw` picks the noise.
Delta = Callable[[str, float, int], float]

MIN_LEVELS = 3
MAX_T = 4.0**-0.85  # the theorem's linear range: t^2 <= 4^-1.7
AGREEMENT = 0.99
_SMALL = 1e-4  # of the largest slope: what a slope that came out negative is set to, at most
_RESAMPLES = 512


@dataclass(frozen=True)
class Slope:
    """alpha and its standard error; levels: the (t^2, delta) behind them, ascending; clamped: see `clamp_slopes`."""

    alpha: float
    stderr: float
    levels: tuple[tuple[float, float], ...]
    clamped: bool = False


def noise_levels(count: int = LEVELS) -> list[float]:
    """`count` values of t, spread evenly over (0, MAX_T]."""
    if count < MIN_LEVELS:
        raise PaleyError(f"sensitivity: needs at least {MIN_LEVELS} noise levels for an error bar, got {count}")
    return [MAX_T * (level + 1) / count for level in range(count)]


def level_order(count: int) -> list[int]:
    """All levels, the highest first, then each as far as can be from 0 and those taken: any prefix is spread evenly."""
    taken = [-1, count - 1]  # -1 is t = 0
    while len(taken) < count + 1:
        rest = [level for level in range(count) if level not in taken]
        taken.append(max(rest, key=lambda level: (min(abs(level - other) for other in taken), level)))
    return taken[1:]


def fit_slope(levels: Iterable[tuple[float, float]]) -> Slope:
    """(t^2, delta) of at least two levels -> the least-squares line through the origin.

    alpha = sum delta t^2 / sum t^4. stderr is the jackknife's: the root of sum_j (alpha without level j - alpha)^2,
    where alpha without j = alpha - h_j r_j / ((1 - h_j) t_j^2) with residual r_j and leverage h_j = t_j^4 / sum t^4.
    Unlike the usual formula it holds for noise that grows with t, and it counts a bend of the line as error.
    """
    ordered = tuple(sorted(levels))
    total = sum(t2 * t2 for t2, _ in ordered)
    alpha = sum(t2 * delta for t2, delta in ordered) / total
    changes = [t2 * (delta - alpha * t2) / (total - t2 * t2) for t2, delta in ordered]
    return Slope(alpha, math.sqrt(sum(change * change for change in changes)), ordered)


def clamp_slopes(slopes: dict[str, Slope]) -> dict[str, Slope]:
    """Slopes that are not positive become a small positive number, no larger than any measured one, and are flagged.

    The theorem's slopes are positive; one that is not is lost in its noise, and would make an allocator spend nothing.
    """
    positive = [slope.alpha for slope in slopes.values() if slope.alpha > 0]
    if not positive:
        raise PaleyError(
            f"sensitivity: none of the {len(slopes)} slopes is positive, so noise does this model no harm on this "
            "text; use metric kl, or more and longer sequences"
        )
    small = min(_SMALL * max(positive), min(positive))
    return {n: s if s.alpha > 0 else replace(s, alpha=small, clamped=True) for n, s in slopes.items()}


def rank_shifts(slopes: Sequence[Slope], seed: int = 0) -> Tensor:
    """-> [slopes]: the mean squared change of each one's rank when all are drawn anew from their error bars."""
    alpha = torch.tensor([slope.alpha for slope in slopes], dtype=torch.float64)
    stderr = torch.tensor([slope.stderr for slope in slopes], dtype=torch.float64)
    noise = torch.randn(_RESAMPLES, len(slopes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = (alpha + stderr * noise).argsort(1).argsort(1)
    return (ranks - alpha.argsort().argsort()).double().square().mean(0)


def measure_slopes(
    slots: Sequence[str],
    delta: Delta,
    *,
    levels: int = LEVELS,
    agreement: float | None = AGREEMENT,
    on_round: Callable[[int], None] = lambda trials: None,
) -> dict[str, Slope]:
    """Few levels first, more where the ranking needs them -> each slot's slope.

    Every slot gets a quarter of the levels, then half, then all, in `level_order`. It stops when the ranking is
    settled: Spearman's correlation of slopes drawn anew from their error bars with the found ones is at least
    `agreement` on average (None: never). That is 1 - 6 sum d^2 / (n (n^2 - 1)) with d a slot's change of rank, so
    a slot whose mean d^2 exceeds its even share is what keeps it down, and only those are measured further.

    delta is called with the level as its draw. on_round gets the number of trials about to be made.
    """
    times, order = noise_levels(levels), level_order(levels)
    found: dict[str, list[tuple[float, float]]] = {slot: [] for slot in slots}
    slopes: dict[str, Slope] = {}
    todo, done = list(slots), 0
    rounds = [levels] if agreement is None else [max(2, -(-levels // 4)), -(-levels // 2), levels]
    for wanted in dict.fromkeys(rounds):
        on_round(len(todo) * (wanted - done))
        for slot in todo:
            found[slot] += [(times[j] ** 2, _finite(slot, delta, times, j)) for j in order[done:wanted]]
            slopes[slot] = fit_slope(found[slot])
        done, todo = wanted, _unsettled(slopes, agreement)
        if not todo:
            break
    return clamp_slopes(slopes)


def _unsettled(slopes: dict[str, Slope], agreement: float | None) -> list[str]:
    """The slots that keep the ranking from being settled; none where it is."""
    if agreement is None:
        return list(slopes)
    share = (1 - agreement) * (len(slopes) ** 2 - 1) / 6
    shifts = rank_shifts(list(slopes.values())).tolist()
    if sum(shifts) <= len(slopes) * share:
        return []
    return [slot for slot, shift in zip(slopes, shifts, strict=True) if shift > share]


def _finite(slot: str, delta: Delta, times: list[float], level: int) -> float:
    value = delta(slot, times[level], level)
    if math.isfinite(value):
        return value
    where = f"{slot}: the loss at noise level {level + 1} of {len(times)} (t={times[level]:.3f}) is {value}"
    if math.isfinite(delta(slot, times[0], 0)):
        raise PaleyError(
            f"{where}, but finite at the lowest (t={times[0]:.3f}): only strong noise makes it overflow; use metric "
            "kl, or leave this slot unquantized"
        )
    raise PaleyError(f"{where}, and not finite at the lowest level either; look for extreme values in its weights")
