"""What a measurement holds at its peak, here or in a worker, by which too large ones are refused before any work."""

from __future__ import annotations

from paley.arch import Sites
from paley.data import TokenBlocks
from paley.eval.perplexity import BATCH
from paley.model.capture import LOGITS
from paley.model.trials import KEPT
from paley.model.tuning import activation_bytes
from paley.pipeline.costs import COSTS, FLOAT

__all__ = ["of_gradients", "of_scores", "of_tensors", "of_trials", "pages_pay"]

_CHANCES = 3  # tensors of logits as gradients begin there
_LOGITS = 10  # tensors of logits that a comparison has at a time, with what the allocator keeps
_NOISY = 4  # a weight as it was, its noise, that by its size, and the sum
_ACTIVATIONS = 6  # what a block holds of a batch: times the hidden states, and the widest input


def of_tensors(sites: Sites, workers: int) -> int:
    """Of a worker that quantizes weights, tensor by tensor: the mean, if the largest ones are at work together."""
    largest = sorted((site.numel for site in sites.weights), reverse=True)[:workers]
    return round(COSTS.base + COSTS.tensor * FLOAT * sum(largest) / workers)


def of_trials(sites: Sites, blocks: TokenBlocks, *, paged: bool, own_head: bool) -> int:
    """Of a process that makes trials of a sensitivity. own_head: noise goes into the head, so that a copy is kept."""
    held = _whole(sites)
    if paged:
        held = _outer(sites) + max(_block(sites, index) for index in range(sites.blocks))
    tokens, row = blocks.ids.numel(), FLOAT * sites.head.shape[1]
    noisy, values = FLOAT * max(site.numel for site in sites.weights), tokens * sites.head.shape[0]
    kept, compared = min(KEPT, FLOAT * values), _LOGITS * FLOAT * min(LOGITS, values)
    states = 3 * tokens * row + _ACTIVATIONS * _batch(blocks) * (row + FLOAT * _widest(sites))
    at_work = max(_NOISY * noisy, noisy + compared)
    return round(COSTS.base + held + own_head * FLOAT * sites.head.numel + kept + at_work + states)


def of_gradients(sites: Sites, seq_len: int) -> int:
    """Of a measurement by gradients: the model, and of one sequence what blocks leave for the way back, and logits."""
    largest, logits = max(site.numel for site in sites.weights), seq_len * sites.head.shape[0]
    held = _whole(sites) + activation_bytes(sites, seq_len) + FLOAT * (largest + _CHANCES * logits)
    return round(COSTS.base + held)


def of_scores(sites: Sites, blocks: TokenBlocks, *, compared: bool) -> int:
    """Of a worker that scores batches of a text through a model, and through the original if it is compared with."""
    states = (2 + _ACTIVATIONS) * _batch(blocks) * FLOAT * (sites.head.shape[1] + _widest(sites))
    return round(COSTS.base + _whole(sites) * (1 + COSTS.coded) + compared * FLOAT * sites.head.numel + states)


def pages_pay(sites: Sites, tokens: int) -> bool:
    """Whether the states of a whole text, which wait at each block of a paged model, are smaller than the model."""
    return 3 * FLOAT * tokens * sites.head.shape[1] < _whole(sites)


def _batch(blocks: TokenBlocks) -> int:
    """Tokens that pass through a block together."""
    return min(BATCH, len(blocks.ids)) * blocks.ids.shape[1]


def _whole(sites: Sites) -> int:
    return FLOAT * sum(site.numel for site in sites.weights)


def _outer(sites: Sites) -> int:
    return FLOAT * sum(site.numel for site in sites.weights if site.block is None)


def _block(sites: Sites, index: int) -> int:
    return FLOAT * sum(site.numel for site in sites.of("linear", block=index))


def _widest(sites: Sites) -> int:
    return max((site.shape[-1] for site in sites.of("linear")), default=0)
