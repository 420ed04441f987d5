"""The negative log-likelihood of tokens, and checks before and after computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.data import TokenBlocks
from paley.model.adapter import Adapter
from paley.model.linear import QuantLinear

__all__ = [
    "CHUNK",
    "check_finite",
    "check_mode",
    "check_scorable",
    "few_tokens",
    "head_slices",
    "scores",
    "slices",
]

CHUNK = 128  # tokens of a sequence that pass through a quantized cache at a time
TOKENS, VOCABULARY = 512, 4096  # of the logits that exist at a time: 8 MB

Slices = Iterator[tuple[int, Tensor]]  # the first token's number, and the logits [n, some] from there on
Finish = Callable[[Tensor], Tensor]


def scores(logits: Slices, originals: Slices | None, targets: Tensor, finish: Finish = lambda x: x) -> Tensor:
    """Of the same slices of logits of a model and, with `originals`, of the original's -> float32 [1 or 3, n].

    Nats of each target [n]; with the original also KL(original || logits), and 1 where the same token is most likely to
    both. finish: what makes logits of what heads compute (`Adapter.finish`). Nats are NaN at positions with a logit
    that is NaN or infinite; `check_finite` finds these.
    """
    q, p = _Softmax(targets), _Softmax(targets)
    apart = torch.zeros_like(q.total)  # sum over tokens of e^original * (original - logits)
    for start, few in logits:
        few = finish(few.float())
        q.add(start, few)
        if originals is not None:
            _, own = next(originals)
            shares, shrunk = p.add(start, own := finish(own.float()))
            apart = apart * shrunk + shares.mul_(own.sub_(few)).sum(-1)
    nll = (q.log_total() - q.target).masked_fill(~q.finite, torch.nan)
    if originals is None:
        return nll.float()[None]
    kl = apart / p.total - p.log_total() + q.log_total()
    return torch.stack([nll, kl, (p.best == q.best).double()]).float()


class _Softmax:
    """The sum of e^logit of n rows that come in slices, their largest logits, and the logits of their targets [n]."""

    def __init__(self, targets: Tensor):
        self._targets = targets
        self.total, self.target = torch.zeros(2, len(targets), dtype=torch.float64, device=targets.device)
        self._largest = torch.full_like(self.total, -torch.inf, dtype=torch.float32)
        self.best = torch.zeros_like(targets)
        self.finite = torch.ones_like(targets, dtype=torch.bool)

    def add(self, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [n, some] -> e^(logits - largest so far), and what sums of such terms until now shrink by."""
        low, (high, at) = logits.amin(-1), logits.max(-1)
        self.finite &= low.isfinite() & high.isfinite()
        self.best = torch.where(high > self._largest, at + start, self.best)
        largest = torch.maximum(self._largest, high)
        shrunk, self._largest = (self._largest - largest).double().exp(), largest
        terms = (logits - largest[:, None]).exp_()
        self.total = self.total * shrunk + terms.sum(-1)
        inside = (self._targets - start).clamp(0, logits.shape[1] - 1)
        here = inside == self._targets - start
        self.target = torch.where(here, logits.gather(-1, inside[:, None])[:, 0].double(), self.target)
        return terms, shrunk

    def log_total(self) -> Tensor:
        """float64 [n]: the logarithm of the whole sum."""
        return self._largest.double() + self.total.log()


def slices(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Slices:
    """x [n, hidden], weight [vocab, hidden] -> the logits x Wᵀ + bias, some of the vocabulary at a time."""
    for start in range(0, len(weight), VOCABULARY):
        some = slice(start, start + VOCABULARY)
        yield start, linear(x, weight[some], None if bias is None else bias[some])


def head_slices(head: nn.Module, hidden: Tensor) -> Slices:
    """hidden [n, hidden] -> the logits of a model's head, some of the vocabulary at a time."""
    if type(head) is nn.Linear:  # a class of its own may do more than multiply
        return slices(hidden, head.weight, head.bias)
    if isinstance(head, QuantLinear) and (parts := head.parts(hidden)) is not None:
        return slices(*parts)
    logits = head(hidden)
    return ((start, logits[:, start : start + VOCABULARY]) for start in range(0, logits.shape[1], VOCABULARY))


def few_tokens(tokens: int) -> Iterator[slice]:
    """Slices of so few tokens that a slice of their logits is small."""
    return (slice(start, min(start + TOKENS, tokens)) for start in range(0, tokens, TOKENS))


def check_finite(nll: Tensor, first: int, source: str) -> None:
    """Raises if nll [batch, n] has a NaN; `first` is the index of the batch's first sequence."""
    bad = nll.isnan().any(1)
    if bad.any():  # names no position: attention spreads a NaN to earlier tokens too, as 0 * NaN
        sequence = first + int(bad.nonzero()[0])
        raise PaleyError(
            f"{source}: the model's logits are NaN or infinite, first in sequence {sequence} "
            "(counted from 0); look for NaN in its weights and scales, or use float32 if 16 bits overflow"
        )


def check_mode(model: PreTrainedModel) -> None:
    """Raises if the model is in training mode, as dropout would change the result."""
    if model.training:
        raise PaleyError(f"{type(model).__name__} is in training mode; call model.eval() first")


def check_scorable(model: PreTrainedModel, blocks: TokenBlocks, batch: int, chunk: int) -> None:
    """Raises for sizes that leave nothing to do, ids without an embedding, and a model in training mode."""
    check_mode(model)
    if batch < 1 or chunk < 1:
        raise PaleyError(f"evaluation: needs batch >= 1 and chunk >= 1, got batch={batch}, chunk={chunk}")
    if blocks.ids.shape[1] < 2:
        raise PaleyError(f"{blocks.source}: blocks of one token predict nothing; use seq_len >= 2")
    vocabulary = Adapter(model).sites.embedding.shape[0]
    low, high = int(blocks.ids.min()), int(blocks.ids.max())
    if low < 0 or high >= vocabulary:
        raise PaleyError(
            f"{blocks.source}: token ids are in [{low}, {high}], but the model's vocabulary has {vocabulary} "
            "tokens; use the tokenizer that belongs to the model"
        )
