"""Text that a model samples from itself: calibration without data (LLM-QAT, arXiv:2305.17888)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from paley.core.errors import PaleyError
from paley.eval.scoring import check_mode
from paley.model.kv_cache import cache_argument

__all__ = ["sample_documents"]


@torch.no_grad()
def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    tokens: int,
    seed: int,
    batch: int = 8,
) -> Tensor:
    """-> ids int64 [count, tokens] on the CPU: `count` texts sampled at temperature 1, each from BOS.

    After EOS the text continues with BOS, as a new document. BOS is the tokenizer's, else the model config's.
    Each text has its own generator, drawn from `seed`, so that `batch` changes only the speed.
    """
    if count < 1 or tokens < 2 or batch < 1:
        raise PaleyError(f"sampling: needs count >= 1, tokens >= 2 and batch >= 1, got {count=}, {tokens=}, {batch=}")
    check_mode(model)
    bos, eos = _ends(model, tokenizer)
    # Drawn, not seed + i: neighbouring seeds would have all texts but one in common.
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    parts = [_sample_batch(model, generators[at : at + batch], tokens, bos, eos) for at in range(0, count, batch)]
    return torch.cat(parts)


def _sample_batch(
    model: PreTrainedModel, generators: list[torch.Generator], tokens: int, bos: int, eos: int | None
) -> Tensor:
    """-> ids [len(generators), tokens], sampled token by token for all rows."""
    cache = DynamicCache(config=model.config)
    ids = torch.full((len(generators), tokens), bos)
    for t in range(1, tokens):
        step = ids[:, t - 1 : t].to(model.device)
        logits = model(step, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)).logits[:, -1]
        # On the CPU: its generators give the same numbers whatever the model's device.
        probabilities = logits.float().softmax(-1).cpu()
        if not probabilities.isfinite().all():
            raise PaleyError(
                f"sampling: the model's logits are NaN or infinite at position {t - 1}; look for NaN in its "
                "weights, or use dtype float32 where float16 overflows"
            )
        for row, generator in enumerate(generators):
            if eos is None or int(ids[row, t - 1]) != eos:  # else it stays BOS
                ids[row, t] = torch.multinomial(probabilities[row], 1, generator=generator)
    return ids


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int | None]:
    """-> BOS, and EOS unless one token is both (that token then begins the next document)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(model.config, "bos_token_id", None)
    if not isinstance(bos, int):
        raise PaleyError(
            "sampling: neither the tokenizer nor the model's config has a BOS token to start from; calibrate "
            "on a text instead (calibration.source)"
        )
    eos = tokenizer.eos_token_id
    return bos, eos if isinstance(eos, int) and eos != bos else None
