"""Slopes of the linearity theorem: how fast a loss grows with the relative squared error t^2 of each site.

E loss(all sites perturbed) ~ loss + sum_l alpha_l t_l^2, for noise as for rounding (HIGGS, arXiv:2411.17525). The model
is behind one callable, so that a test of the measurement takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from paley.core.defaults import LEVELS
from paley.core.errors import PaleyError

__all__ = [
    "AGREEMENT",
    "LEVELS",
    "Delta",
    "Method",
    "Slope",
    "Trial",
    "clamp_slopes",
    "fit_slope",
    "level_order",
    "measure_slopes",
    "method_for",
    "noise_levels",
    "rank_shifts",
]

# delta(site, t, draw): the loss added by noise of relative size t in `site`; `draw` picks the noise.
Delta = Callable[[str, float, int], float]
Trial = tuple[str, float, int]  # what delta is called with
Method = Literal["gradients", "noise"]

MIN_LEVELS = 3
MAX_T = 4.0**-0.85  # the theorem's linear range: t^2 <= 4^-1.7
AGREEMENT = 0.99
_SMALL = 1e-4  # times the largest slope: the most that a negative slope is set to
_RESAMPLES = 512


@dataclass(frozen=True)
class Slope:
    """alpha and its standard error; clamped: see `clamp_slopes`.

    levels: the (t^2, delta) behind them, ascending; none where gradients are.
    """

    alpha: float
    stderr: float
    levels: tuple[tuple[float, float], ...]
    clamped: bool = False


def method_for(metric: str) -> Method:
    """The quickest way to a metric's slopes: gradients tell of KL alone."""
    return "gradients" if metric == "kl" else "noise"


def noise_levels(count: int = LEVELS) -> list[float]:
    """`count` values of t, spread evenly over (0, MAX_T]."""
    if count < MIN_LEVELS:
        raise PaleyError(f"sensitivity: needs at least {MIN_LEVELS} noise levels for an error bar, got {count}")
    return [MAX_T * (level + 1) / count for level in range(count)]


def level_order(count: int) -> list[int]:
    """All levels, the highest first, then each as far as possible from 0 and those taken: any prefix is spread out."""
    taken = [-1, count - 1]  # -1 is t = 0
    while len(taken) < count + 1:
        rest = [level for level in range(count) if level not in taken]
        taken.append(max(rest, key=lambda level: (min(abs(level - other) for other in taken), level)))
    return taken[1:]


def fit_slope(levels: Iterable[tuple[float, float]]) -> Slope:
    """(t^2, delta) of at least two levels -> the least-squares line through the origin.

    alpha = sum delta t^2 / sum t^4. stderr is the jackknife's: the root of sum_j (alpha without level j - alpha)^2,
    where alpha without j = alpha - h_j r_j / ((1 - h_j) t_j^2) with residual r_j and leverage h_j = t_j^4 / sum t^4.
    Unlike the usual formula it is valid for noise that grows with t, and it counts a bend of the line as error.
    """
    ordered = tuple(sorted(levels))
    total = sum(t2 * t2 for t2, _ in ordered)
    alpha = sum(t2 * delta for t2, delta in ordered) / total
    changes = [t2 * (delta - alpha * t2) / (total - t2 * t2) for t2, delta in ordered]
    return Slope(alpha, math.sqrt(sum(change * change for change in changes)), ordered)


def clamp_slopes(slopes: dict[str, Slope]) -> dict[str, Slope]:
    """Slopes that are not positive become a small positive number, no larger than any measured one, and are flagged.

    The theorem's slopes are positive. A measured one that is not is smaller than its noise; with it, an allocator would
    spend nothing on the site.
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
    """-> [slopes]: the mean squared change of each one's rank if all are drawn again from their error bars."""
    alpha = torch.tensor([slope.alpha for slope in slopes], dtype=torch.float64)
    stderr = torch.tensor([slope.stderr for slope in slopes], dtype=torch.float64)
    noise = torch.randn(_RESAMPLES, len(slopes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = (alpha + stderr * noise).argsort(1).argsort(1)
    return (ranks - alpha.argsort().argsort()).double().square().mean(0)


def measure_slopes(
    sites: Sequence[str],
    delta: Delta,
    *,
    levels: int = LEVELS,
    agreement: float | None = AGREEMENT,
    on_round: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> dict[str, Slope]:
    """Measures few levels first, and more if the ranking needs them -> each site's slope.

    Every site gets a quarter of the levels, then half, then all, in `level_order`. Measuring stops when the ranking is
    settled: slopes drawn again from their error bars have a Spearman correlation of at least `agreement`, on average,
    with the measured ones (None: never). The correlation is 1 - 6 sum d^2 / (n (n^2 - 1)), with d a site's change of
    rank. Only sites whose mean d^2 exceeds an even share are measured further.

    delta is called with the level as its draw. on_round gets the trials that are about to be made, one after the other:
    whoever shares them makes them then, and delta only tells what came out.
    """
    times, order = noise_levels(levels), level_order(levels)
    measured: dict[str, list[tuple[float, float]]] = {site: [] for site in sites}
    slopes: dict[str, Slope] = {}
    todo, done = list(sites), 0
    rounds = [levels] if agreement is None else [max(2, -(-levels // 4)), -(-levels // 2), levels]
    for wanted in dict.fromkeys(rounds):
        on_round([(site, times[level], level) for site in todo for level in order[done:wanted]])
        for site in todo:
            measured[site] += [(times[j] ** 2, _finite(site, delta, times, j)) for j in order[done:wanted]]
            slopes[site] = fit_slope(measured[site])
        done, todo = wanted, _unsettled(slopes, agreement)
        if not todo:
            break
    return clamp_slopes(slopes)


def _unsettled(slopes: dict[str, Slope], agreement: float | None) -> list[str]:
    """The sites that keep the ranking from being settled; an empty list if it is."""
    if agreement is None:
        return list(slopes)
    share = (1 - agreement) * (len(slopes) ** 2 - 1) / 6
    shifts = rank_shifts(list(slopes.values())).tolist()
    if sum(shifts) <= len(slopes) * share:
        return []
    return [site for site, shift in zip(slopes, shifts, strict=True) if shift > share]


def _finite(site: str, delta: Delta, times: list[float], level: int) -> float:
    value = delta(site, times[level], level)
    if math.isfinite(value):
        return value
    where = f"{site}: the loss at noise level {level + 1} of {len(times)} (t={times[level]:.3f}) is {value}"
    if math.isfinite(delta(site, times[0], 0)):
        raise PaleyError(
            f"{where}, but finite at the lowest (t={times[0]:.3f}): only strong noise makes it overflow; use metric "
            "kl, or leave this site unquantized"
        )
    raise PaleyError(f"{where}, and not finite at the lowest level either; look for extreme values in its weights")
