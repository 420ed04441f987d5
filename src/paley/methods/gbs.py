"""Gradual binary search: finds one clip ratio after the other, by the loss of the whole model.

arXiv:2504.13989, algorithm 1. The model is behind two callables, so that a test of the search takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paley.core.errors import PaleyError

__all__ = ["Outcome", "bracket_search", "gradual_search", "local_search"]

Score = Callable[[float], float]


@dataclass(frozen=True)
class Outcome:
    """The result of a site's search: the clip ratio and its loss (lower is better)."""

    clip_ratio: float
    loss: float


def bracket_search(score: Score, iterations: int = 10) -> Outcome:
    """The paper's schedule on (0, 1]: halves left and right of the best point in turn."""
    low, best, high = 0.0, 0.5, 1.0
    best_loss = score(best)
    for iteration in range(iterations):
        if high - low <= 1e-3:
            break
        x = (low + best) / 2 if iteration % 2 == 0 else (best + high) / 2
        loss = score(x)
        if loss < best_loss:
            if x < best:
                high = best
            else:
                low = best
            best, best_loss = x, loss
        elif x < best:
            low = x
        else:
            high = x
    return Outcome(best, best_loss)


def local_search(
    score: Score, starts: Sequence[float], iterations: int = 5, *, step: float = 0.1, min_gain: float = 0.002
) -> Outcome:
    """Ours: the best of the given starts, then its neighbours at a step that halves when both are worse.

    A ratio replaces the best so far only if the loss falls by a share of min_gain; a smaller gain may be noise of the
    search text. The result is never worse than the first start. `iterations` counts trials after the starts.
    """
    losses: dict[float, float] = {}
    best = starts[0]

    def improves(x: float) -> bool:
        return losses[x] < losses[best] * (1 - min_gain)

    for start in dict.fromkeys(starts):
        losses[start] = score(start)
        best = start if improves(start) else best
    side, failures, trials = -1, 0, 0
    while trials < iterations and step >= 0.01:
        x = round(best + side * step, 4)
        if x > 0 and x not in losses:
            losses[x] = score(x)
            trials += 1
        if x > 0 and improves(x):
            best, failures = x, 0
            continue
        side, failures = -side, failures + 1
        if failures == 2:
            step, failures = step / 2, 0
    return Outcome(best, losses[best])


def gradual_search(
    sites: Sequence[str],
    evaluate: Callable[[str, float], float],
    settle: Callable[[str, Outcome], None],
    search: Callable[[str, Score], Outcome],
) -> dict[str, Outcome]:
    """Visits `sites` in order: searches each one, with those before it settled, and then settles it.

    evaluate(site, clip_ratio) is the model's loss with that site at its target bits and clip ratio.
    """
    outcomes: dict[str, Outcome] = {}
    for site in sites:

        def score(clip_ratio: float, site: str = site) -> float:
            loss = evaluate(site, clip_ratio)
            if math.isnan(loss):
                raise PaleyError(f"{site}: the loss at clip_ratio={clip_ratio} is NaN; check the model's weights")
            return loss

        outcomes[site] = search(site, score)
        settle(site, outcomes[site])
    return outcomes
