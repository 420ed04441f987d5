"""What a report measures when the original is there: KL of each token, and outliers of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Measured", "Worst"]

_BINS = 32


@dataclass(frozen=True)
class Worst:
    """A token that the model predicts far worse; chances: of the text's own token, in the original and here."""

    before: str
    token: str
    after: str
    kl: float
    original: float
    here: float


@dataclass(frozen=True)
class Measured:
    """kl [sequences, tokens]; peaks: name of a linear -> (original's, here) largest input over root mean square."""

    source: str
    kl: Tensor
    worst: tuple[Worst, ...]
    peaks: dict[str, tuple[float, float]]

    @property
    def sequences(self) -> int:
        return len(self.kl)

    def by_position(self) -> list[tuple[float, float]]:
        """(position, mean KL) of some bins."""
        means = self.kl.mean(0)
        return [
            (float(at.double().mean()) + 1, float(part.mean()))
            for at, part in zip(torch.arange(len(means)).tensor_split(_BINS), means.tensor_split(_BINS), strict=True)
            if len(part)
        ]

    def concentration(self) -> list[tuple[float, float]]:
        """(part of the tokens, the worst first; their part of all KL)"""
        falling = self.kl.flatten().clamp(min=0).sort(descending=True).values.double().cumsum(0)
        parts = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
        return [(p, float(falling[max(0, round(p * len(falling)) - 1)] / falling[-1].clamp(min=1e-30))) for p in parts]
