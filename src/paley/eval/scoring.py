"""The negative log-likelihood of tokens, and checks before and after computing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.data import TokenBlocks
from paley.model.adapter import Adapter

__all__ = ["CHUNK", "check_finite", "check_mode", "check_scorable", "few_tokens", "scores"]

CHUNK = 128  # tokens of a sequence that pass through a quantized cache at a time
LOGITS = 2**21  # that exist at a time: 8 MB


def scores(logits: Iterable[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """Of (logits, the original's logits or None, targets) of a few tokens at a time -> float32 [1 or 3, all tokens].

    Nats of each target; with the original also KL(original || logits), and 1 where the same token is most likely to
    both. Nats are NaN at positions with a logit that is NaN or infinite; `check_finite` finds these.
    """
    return torch.cat([_scores(*few) for few in logits], -1)


def _scores(logits: Tensor, original: Tensor | None, targets: Tensor) -> Tensor:
    """logits [n, vocab], original [n, vocab] or None, targets [n] -> [1 or 3, n]."""
    q = logits.float().log_softmax(-1)
    nll = -q.gather(-1, targets[:, None])[:, 0]
    nll = nll.masked_fill(~logits.isfinite().all(-1), torch.nan)
    if original is None:
        return nll[None]
    p = original.float().log_softmax(-1)
    agrees = (p.argmax(-1) == q.argmax(-1)).float()
    return torch.stack([nll, (p.exp() * p.sub_(q)).sum(-1), agrees])


def few_tokens(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of so few tokens that their logits stay in a CPU's caches."""
    few = max(1, LOGITS // vocabulary)
    return (slice(start, min(start + few, tokens)) for start in range(0, tokens, few))


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
