"""Draws the next token from logits.

Order: penalties, temperature, top-k, top-p, min-p, as in transformers. top-p: Holtzman et al., arXiv:1904.09751; min-p:
Nguyen et al., arXiv:2407.01082; the repetition penalty: Keskar et al., arXiv:1909.05858.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from paley.core.errors import PaleyError, Setting

__all__ = ["Sampler", "Sampling", "log_probabilities"]

# Setting -> (least, most), both allowed; `_ABOVE`: the least is not.
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "seed": (-(2**63), 2**63 - 1),
}
_ABOVE = {"top_p"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; PaleyError for a value out of its range.

    temperature: 0 takes the most likely token each time, and the cuts below change nothing.
    top_k: only so many of the most likely tokens; 0: all. top_p: the fewest tokens whose chances reach it together.
    min_p: tokens whose chance is at least this part of the largest one.
    repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied.
    presence_penalty, frequency_penalty: taken off logits of tokens in the answer, once, and for each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, (least, most) = getattr(self, each.name), _RANGES[each.name]
            above = each.name in _ABOVE
            if not ((least < value if above else least <= value) and value <= most):  # false for NaN
                raise PaleyError(
                    Setting(each.name, value), f": must be {f'above {least:g}' if above else f'{least:g} or more'}",
                    *([f" and at most {most:g}"] if most < 2**31 else []),
                )  # fmt: skip


class Sampler:
    """Draws the tokens of one text, by a generator of its own."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]):
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._made: dict[int, int] = {}  # token -> how often it is in the answer
        self._seen = set(prompt)

    def choose(self, logits: Tensor) -> int:
        """logits float32 [vocabulary] on the CPU -> a token, which counts as drawn from now on."""
        if not math.isfinite(logits.max()):  # NaN if one is; -inf forbids a token, but not all
            raise PaleyError(
                "the model's logits are NaN or infinite",
                remedy="`paley verify` tells whether its files are damaged; float16 overflows where float32 does not",
            )
        token = self._drawn(self._penalized(logits))
        self._made[token] = self._made.get(token, 0) + 1
        self._seen.add(token)
        return token

    def _penalized(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if s.repetition_penalty != 1 and self._seen:
            seen = torch.tensor(sorted(self._seen))
            before = logits[seen]
            factor = torch.where(before > 0, 1 / s.repetition_penalty, s.repetition_penalty)
            logits = logits.index_copy(0, seen, before * factor)
        if (s.presence_penalty or s.frequency_penalty) and self._made:
            made = torch.tensor(list(self._made))
            counts = torch.tensor(list(self._made.values()), dtype=logits.dtype)
            logits = logits.index_add(0, made, -(s.presence_penalty + s.frequency_penalty * counts))
        return logits

    def _drawn(self, logits: Tensor) -> int:
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        values, tokens = logits, None
        if s.top_k and s.top_k < len(logits):
            values, tokens = logits.topk(s.top_k)
        elif s.top_p < 1:
            values, tokens = logits.sort(descending=True, stable=True)
        # From the largest value, before the division: at a temperature near 0 the others vanish, and nothing overflows.
        chances = ((values.double() - values.max()) / s.temperature).softmax(0)
        if s.top_p < 1:  # a token stays if those before it do not reach top_p
            chances = chances * (chances.cumsum(0) - chances < s.top_p)
        if s.min_p > 0:
            chances = chances * (chances >= s.min_p * chances.max())
        below = chances.cumsum(0)
        draw = torch.rand(1, dtype=torch.float64, generator=self._generator) * below[-1]
        at = int(torch.searchsorted(below, draw, right=True))
        at = min(at, int(chances.nonzero()[-1]))  # rounding may leave the draw at the very end
        return at if tokens is None else int(tokens[at])


def log_probabilities(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Of the model itself, before penalties and temperature: the token's, and those of the `top` most likely ones."""
    logs = logits.double().log_softmax(0)
    values, tokens = logs.topk(min(top, len(logs)))
    return float(logs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
