"""Scores shared by the workers of a pool: a task is one batch of sequences, through the original or the model.

A batch is the one that a process alone would take, so that the figures are the same. A worker opens a model once and
holds one at a time. What the original said of a batch (hidden states and losses) travels with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from paley.core.errors import PaleyError
from paley.data import TokenBlocks, blocks_from_ids
from paley.eval.perplexity import BATCH, EvalResult, Means, sequence_means, summary
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.loading import open_source
from paley.pipeline.any_model import load_any
from paley.pipeline.monitor import Monitor
from paley.pipeline.pool import Pool

__all__ = ["Batch", "measure_original", "score_batch", "shared_score"]

_HELD: dict[tuple[str, str], Any] = {}


@dataclass(frozen=True, eq=False)
class Batch:
    """ids int64 [sequences, seq_len] of a text, the first of them number `at`.

    model: a folder; against: the original's, or empty. hidden float32 [sequences, seq_len, hidden], nll
    [sequences, seq_len - 1]: what `measure_original` found.
    """

    model: str
    against: str
    fingerprint: str
    source: str
    at: int
    ids: np.ndarray
    hidden: np.ndarray | None = None
    nll: np.ndarray | None = None

    @property
    def blocks(self) -> TokenBlocks:
        return blocks_from_ids(torch.tensor(self.ids), "test", self.source)


def measure_original(batch: Batch) -> Batch:
    """In a worker: -> the batch with what the original says of it."""
    model = _hold("original", batch.against, lambda: _opened(batch).load())
    found = Reference.of(model, batch.blocks, batch=BATCH)
    return replace(batch, hidden=found.hidden.numpy(), nll=found.nll.numpy())


def score_batch(batch: Batch) -> tuple[int, Means]:
    """In a worker: -> the number of the batch's first sequence, and its scores."""
    reference = None
    if batch.hidden is not None and batch.nll is not None:
        head, bias = _hold("head", batch.against, lambda: _head(batch))
        blocks = batch.blocks
        hidden, nll = torch.tensor(batch.hidden), torch.tensor(batch.nll)
        reference = Reference(hidden, head, nll, batch.source, blocks.sha256, bias)
    model = _hold("model", batch.model, lambda: load_any(batch.model))
    return batch.at, sequence_means(model, batch.blocks, reference, batch=BATCH, first=batch.at)


def shared_score(
    model: str, against: str, fingerprint: str, blocks: TokenBlocks, pool: Pool, monitor: Monitor
) -> EvalResult:
    """The scores of the folder `model`; against, fingerprint: of the original, or empty."""
    batches = [
        Batch(model, against, fingerprint, blocks.source, at, blocks.ids[at : at + BATCH].numpy())
        for at in range(0, len(blocks.ids), BATCH)
    ]
    nll = None
    try:
        if against:
            monitor.stage("measuring the original", len(batches))
            found = dict[int, Batch]()
            for batch in pool.run(measure_original, batches):
                found[batch.at] = batch
                monitor.step()
            batches = [found[at] for at in sorted(found)]
            nll = torch.cat([torch.tensor(batch.nll) for batch in batches])
        monitor.stage("evaluating", len(batches))
        scored = dict[int, Means]()
        for at, means in pool.run(score_batch, batches):
            scored[at] = means
            monitor.step()
    finally:
        _HELD.clear()  # a pool does a single task here
    ordered = [scored[at] for at in sorted(scored)]
    return summary(blocks, replace(ordered[-1], columns=torch.cat([means.columns for means in ordered], 1)), nll)


def _hold(what: str, path: str, make: Callable[[], Any]) -> Any:
    """The model, or the original's head, of this process; one model at a time."""
    if (what, path) not in _HELD:
        for other in [key for key in _HELD if key[0] != "head" or what == "original"]:
            del _HELD[other]
        _HELD[what, path] = make()
    return _HELD[what, path]


def _opened(batch: Batch) -> Any:
    source = open_source(batch.against)
    if source.fingerprint != batch.fingerprint:
        raise PaleyError(f"{batch.against}: a worker sees other weights here; put it on storage that all share")
    return source


def _head(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = Adapter(_opened(batch).load(blocks=False)).head
    return head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
