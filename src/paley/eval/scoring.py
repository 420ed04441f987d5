"""The negative log-likelihood of tokens, and checks before and after computing it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.data import TokenBlocks
from paley.model.adapter import Adapter

__all__ = ["CHUNK", "check_finite", "check_mode", "check_scorable", "token_nll"]

CHUNK = 128  # tokens whose logits exist at a time


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [batch, n, vocab], targets [batch, n] -> nats, float32 [batch, n].

    NaN at positions with a logit that is NaN or infinite; `check_finite` finds these.
    """
    logits = logits.float()
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view(targets.shape).masked_fill(~logits.isfinite().all(-1), torch.nan)


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
