"""What a trial on a model needs: the hidden states before the block that it changes, and the loss at the end.

Everything before that block stays as it is, so a trial runs from there only.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from paley.core.metrics import kl_divergence
from paley.model.capture import BlockRunner

__all__ = ["Metric", "Objective", "Prefix"]

Metric = Literal["kl", "perplexity"]

KEPT = 2**29  # bytes of the original's logits, of the first tokens


class Prefix:
    """The inputs of one block at a time: cheap to move forward, begun anew to move back."""

    def __init__(self, runner: BlockRunner, ids: Tensor):
        self.runner, self.ids = runner, ids
        self._hidden, self._block = runner.embed(ids), 0

    def before(self, block: int) -> Tensor:
        """-> what block `block` reads [sequences, seq_len, hidden]; valid until the next call, not to be written to."""
        if block < self._block:
            self._hidden, self._block = self.runner.embed(self.ids), 0
        while self._block < block:
            self._hidden = self.runner.block(self._block, self._hidden, out=self._hidden)
            self._block += 1
        return self._hidden


class Objective:
    """The loss of a model's last hidden states on `ids`: KL to the original in nats a token, or perplexity.

    reference: the original's last hidden states [sequences, seq_len, hidden] for the same ids, in the coordinates
    of the runner's norm and head; needed for "kl" only. head: the original's, if the runner's own is changed.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor, reference: Tensor | None, metric: Metric, head: nn.Module | None = None
    ):  # fmt: skip
        assert reference is not None or metric == "perplexity"
        self._head = head
        self.runner, self.ids, self.reference, self.metric = runner, ids, reference, metric
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> float:
        """hidden [sequences, seq_len, hidden]: outputs of the last block."""
        last = torch.zeros_like(self.ids, dtype=torch.bool)
        last[:, -1] = True  # which no token follows
        total, start = 0.0, 0
        last, targets = last.flatten(), self.ids.roll(-1, 1).flatten()
        for i, part in enumerate(self.runner.few_tokens(hidden)):
            logits = self.runner.logits(part).flatten(0, -2)
            here = slice(start, start := start + len(logits))
            if self.metric == "kl":
                losses = kl_divergence(self._original(i), logits)
            else:
                losses = cross_entropy(logits, targets[here], reduction="none")
            total += float(losses.double()[~last[here]].sum())
        mean = total / int((~last).sum())
        if self.metric == "kl":
            return mean
        return math.inf if mean >= 700 else math.exp(mean)  # exp would raise

    def _original(self, part: int) -> Tensor:
        """The original's logits [tokens, vocab] of a part of the tokens."""
        if part in self._kept:
            return self._kept[part]
        assert self.reference is not None
        logits = self.runner.logits(self.runner.few_tokens(self.reference)[part], self._head).flatten(0, -2)
        if sum(kept.nbytes for kept in self._kept.values()) + logits.nbytes <= KEPT:
            self._kept[part] = logits
        return logits
