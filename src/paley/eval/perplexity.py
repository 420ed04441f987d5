"""Perplexity on test blocks and, against the original model, the KL divergence and agreement of predictions.

A quantized KV cache takes part: the text passes through it in chunks, so that keys and values are read back from their
codes. One long forward with transformers' QuantizedCache reads no codes, and so measures no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from paley.core.errors import PaleyError
from paley.data import TokenBlocks, require
from paley.eval.reference import Reference
from paley.eval.scoring import CHUNK, check_finite, check_scorable, few_tokens, head_slices, scores
from paley.kernels.floats import quickly
from paley.model.adapter import Adapter
from paley.model.kv_cache import PackedKVCache, PackedKVLayer, cache_argument
from paley.model.pages import Turns, one_after_another
from paley.results import EvalResult

__all__ = ["BATCH", "EvalResult", "Means", "evaluate", "sequence_means", "summary", "token_scores"]

BATCH = 8  # sequences of one forward


@dataclass(frozen=True)
class Means:
    """What `evaluate` measured of some sequences, before it is summed up.

    columns float64 [1 or 3, sequences]: nats and, with a reference, KL and agreement. kv_bytes: of a cached token.
    """

    columns: Tensor
    kv_bytes: float
    kv_bytes_at_16_bits: float


def evaluate(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    reference: Reference | None = None,
    *,
    chunk: int = CHUNK,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
    turns: Turns = one_after_another,
) -> EvalResult:
    """Position t predicts token t + 1 of each block; blocks must have role test.

    With quantized keys or values, `chunk` tokens at a time pass through a fresh PackedKVCache per batch, or all at once
    if the model has no row, as some types cannot go on from a cache; else there is one forward per batch. progress is
    called with (sequences done, all sequences). turns: as of Reference.of.
    """
    means = sequence_means(model, blocks, reference, chunk=chunk, batch=batch, progress=progress, turns=turns)
    return summary(blocks, means, None if reference is None else reference.nll)


@torch.no_grad()
@quickly
def sequence_means(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    reference: Reference | None = None,
    *,
    chunk: int = CHUNK,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
    turns: Turns = one_after_another,
    first: int = 0,
) -> Means:
    """As `evaluate`, before it is summed up. first: the number of the first sequence, which errors name."""
    require(blocks, "test")
    check_scorable(model, blocks, batch, chunk)
    if reference is not None:
        reference = _fitting(reference, model, blocks)
    cached = _has_quantized_cache(model)
    adapter = Adapter(model)
    kv_bytes = at_16_bits = 2.0 * sum(site.numel for site in adapter.sites.of("keys", "values"))

    def run(at: int) -> Tensor:
        nonlocal kv_bytes
        sequences = slice(at, min(at + batch, len(blocks.ids)))
        ids = blocks.ids[sequences].to(adapter.device)
        cache = PackedKVCache(model) if cached else None
        scores = _score(model, ids, cache, chunk, reference, sequences)
        check_finite(scores[0], first + at, blocks.source)
        if cache is not None:
            kv_bytes = _kv_bytes_per_token(cache, len(ids))
        if progress is not None:
            progress(sequences.stop, len(blocks.ids))
        return scores.double().mean(-1).cpu()

    turns([adapter.try_out])
    columns = turns([partial(run, at) for at in range(0, len(blocks.ids), batch)])
    return Means(torch.cat(columns, 1), kv_bytes, at_16_bits)


@torch.no_grad()
@quickly
def token_scores(model: PreTrainedModel, blocks: TokenBlocks, reference: Reference, *, batch: int = BATCH) -> Tensor:
    """float32 [3, sequences, seq_len - 1]: nats, KL and agreement of each token, as `evaluate` averages them."""
    require(blocks, "test")
    check_scorable(model, blocks, batch, CHUNK)
    reference, cached, found = _fitting(reference, model, blocks), _has_quantized_cache(model), []
    for at in range(0, len(blocks.ids), batch):
        sequences = slice(at, min(at + batch, len(blocks.ids)))
        cache = PackedKVCache(model) if cached else None
        found.append(
            _score(model, blocks.ids[sequences].to(Adapter(model).device), cache, CHUNK, reference, sequences).cpu()
        )
    return torch.cat(found, 1)


def _score(
    model: PreTrainedModel,
    ids: Tensor,
    cache: PackedKVCache | None,
    chunk: int,
    reference: Reference | None,
    sequences: slice,
) -> Tensor:
    """ids [batch, seq_len] -> [1 or 3, batch, seq_len - 1]: nll and, with a reference, KL and agreement."""
    adapter, columns, start = Adapter(model), [], 0
    for hidden in _hidden(model, ids, cache, chunk):
        batch, count, _ = hidden.shape
        places = slice(start, start + count)
        targets = ids[:, start + 1 : start + count + 1].flatten()
        before = None if reference is None else reference.hidden[sequences, places].flatten(0, 1)
        columns.append(_scores(adapter, hidden.flatten(0, 1), targets, reference, before).view(-1, batch, count))
        start += count
    return torch.cat(columns, -1)


def _scores(
    adapter: Adapter, hidden: Tensor, targets: Tensor, reference: Reference | None, before: Tensor | None
) -> Tensor:
    """hidden, before [n, hidden], targets [n] -> [1 or 3, n]."""
    pieces = []
    for few in few_tokens(len(targets)):
        originals = None if reference is None or before is None else reference.slices(before[few])
        pieces.append(scores(head_slices(adapter.head, hidden[few]), originals, targets[few], adapter.finish))
    return torch.cat(pieces, -1)


def _hidden(model: PreTrainedModel, ids: Tensor, cache: PackedKVCache | None, chunk: int) -> Iterator[Tensor]:
    """Hidden states after the last norm [batch, chunk, hidden]; the last token's are left out."""
    adapter = Adapter(model)
    if cache is None:  # the last token is read all the same: what Reference.of ran then agrees to the bit
        yield adapter.head_input(ids, use_cache=False)[:, :-1]
        return
    for piece in ids[:, :-1].split(ids.shape[1] if adapter.architecture.walked else chunk, 1):
        yield adapter.head_input(piece, use_cache=True, **cache_argument(model, cache))


def _has_quantized_cache(model: PreTrainedModel) -> bool:
    schemes = [scheme for m in model.modules() if (scheme := getattr(m, "kv_scheme", None)) is not None]
    return any(scheme.keys is not None or scheme.values is not None for scheme in schemes)


def _kv_bytes_per_token(cache: PackedKVCache, sequences: int) -> float:
    """Bytes of a token while each layer of `cache` holds it; unquantized sides take 16 bits a value, states nothing."""
    total = 0.0
    for layer in cache.layers:
        if isinstance(layer, PackedKVLayer):
            held = layer.get_mask_sizes(0)[0]  # fewer than the tokens read if the layer's attention has a window
            total += layer.nbytes_at_16_bits / (sequences * held)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            total += 2 * (layer.keys.numel() + layer.values.numel()) / (sequences * layer.keys.shape[-2])
    return total


def _fitting(reference: Reference, model: PreTrainedModel, blocks: TokenBlocks) -> Reference:
    """reference with its head on the model's device; raises if its ids or vocabulary do not fit."""
    reference.check(blocks)
    adapter = Adapter(model)
    vocabulary = adapter.sites.head.shape[0]
    if reference.head.shape[0] != vocabulary:
        raise PaleyError(
            f"reference for {reference.source}: its model's vocabulary has {reference.head.shape[0]} tokens, "
            f"this model's {vocabulary}; compare with the model that this one was made from"
        )
    return reference.to(adapter.device)


def summary(blocks: TokenBlocks, measured: Means, original_nll: Tensor | None = None) -> EvalResult:
    """original_nll [sequences, seq_len - 1]: the original's, if it was compared with."""
    means = measured.columns
    nll, nll_stderr = _mean_and_stderr(means[0])
    perplexity = math.exp(nll) if nll < 700 else math.inf
    # Delta method: d exp(nll) = exp(nll) d nll.
    perplexity_stderr = None if nll_stderr is None or perplexity == math.inf else perplexity * nll_stderr
    compared: dict[str, float | None] = {}
    if original_nll is not None:
        original = original_nll.double().mean(1)
        compared["reference_nll"] = float(original.mean())
        for name, column in (("gap", means[0] - original), ("kl", means[1]), ("top1", means[2])):
            mean, compared[f"{name}_stderr"] = _mean_and_stderr(column)
            compared["top1_agreement" if name == "top1" else name] = mean
    return EvalResult(
        source=blocks.source,
        sha256=blocks.sha256,
        sequences=means.shape[1],
        tokens=blocks.ids[:, 1:].numel(),
        nll=nll,
        nll_stderr=nll_stderr,
        perplexity=perplexity,
        perplexity_stderr=perplexity_stderr,
        kv_cache_bytes_per_token=measured.kv_bytes,
        kv_cache_bytes_per_token_at_16_bits=measured.kv_bytes_at_16_bits,
        **compared,
    )


def _mean_and_stderr(values: Tensor) -> tuple[float, float | None]:
    """values [n] -> mean, and its standard error from n - 1 degrees of freedom (None for n = 1)."""
    mean = float(values.mean())
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, float(values.std(correction=1)) / math.sqrt(len(values))
