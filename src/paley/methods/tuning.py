"""Steps of Adam, each value in its own unit; and the KL divergence to another model with its gradient, in pieces.

Adam: Kingma and Ba, arXiv:1412.6980. Scales and norms tuned on frozen codes: arXiv:2407.11062 (EfficientQAT),
arXiv:2402.04396 (QuIP#).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paley.core.metrics import kl_divergence

__all__ = ["PIECE", "Adam", "kl_backward", "rate_at"]

_WARM = 0.1  # of the steps, until the full rate is reached
_FIRST, _SECOND = 0.9, 0.95  # how long gradients, and their squares, are remembered
PIECE = 2**22  # logits that exist at a time


class Adam:
    """values: leaves; units: of each, what a step of rate 1 changes it by, shaped as the value or broadcast to it."""

    def __init__(self, values: Sequence[Tensor], units: Sequence[Tensor]):
        self._values, self._units, self._steps = values, units, 0
        self._first = [torch.zeros_like(value) for value in values]
        self._second = [torch.zeros_like(value) for value in values]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves each value that has a gradient against it, and forgets the gradient."""
        self._steps += 1
        first, second = (1 - memory**self._steps for memory in (_FIRST, _SECOND))
        for value, unit, m, v in zip(self._values, self._units, self._first, self._second, strict=True):
            if value.grad is None:
                continue
            slope = value.grad * unit  # of a change in units
            m.lerp_(slope, 1 - _FIRST)
            v.lerp_(slope.square(), 1 - _SECOND)
            value -= unit * (m * (rate / first) / ((v / second).sqrt() + 1e-12))
            value.grad = None


def rate_at(step: int, steps: int) -> float:
    """The share of the full rate at a step, counted from 0: up in the first tenth, then down a cosine to 0."""
    warm = min(1.0, (step + 1) / max(1.0, _WARM * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def kl_backward(
    hidden: Tensor, original: Tensor, logits: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor],
    vocabulary: int,
) -> float:  # fmt: skip
    """The mean KL(wanted(original) || logits(hidden)) over tokens, in nats; its gradients are added to what made it.

    hidden, original [tokens, n]: what the two heads read. A few tokens' logits [few, vocabulary] exist at a time.
    """
    count, total, ends = len(hidden), 0.0, hidden.detach().requires_grad_()
    few = max(1, PIECE // vocabulary)
    for own, other in zip(ends.split(few), original.split(few), strict=True):
        with torch.no_grad():
            target = wanted(other).float()
        loss = kl_divergence(target, logits(own).float()).sum() / count
        loss.backward()
        total += float(loss.detach())
    assert ends.grad is not None
    hidden.backward(ends.grad)
    return total
