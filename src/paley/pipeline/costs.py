"""What parts of a run cost, in operations of float32 matrix products and in bytes; `bench/estimates.py` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paley.model.key_statistics import TOKENS
from paley.model.problem import Problem

__all__ = ["COSTS", "FLOAT", "Amount", "Costs", "Text", "count_tokens", "read_by_keys", "read_of"]

FLOAT = 4  # bytes of a float32


class Text(Protocol):
    """Calibration, Search, Test, Budget of a recipe: so much text."""

    @property
    def sequences(self) -> int: ...

    @property
    def seq_len(self) -> int: ...


@dataclass(frozen=True)
class Amount:
    """An amount of text: sequences of seq_len tokens."""

    sequences: int
    seq_len: int


@dataclass(frozen=True)
class Costs:
    """What one such thing costs, in operations and bytes.

    Measured with SmolLM2-135M on two cores of an AMD EPYC, where products run at 1.9e11 operations a second.
    """

    turned: float = 200.0  # a value that a linear reads, its Hadamard block
    rounded: float = 600.0  # a value rounded to a grid and back
    logit: float = 1500.0  # softmax and comparison
    compared: float = 600.0  # the same of the search, in the processor's caches
    sampled: float = 2.5  # times the products of a token that the model writes
    loop: tuple[float, ...] = (0.0, 1500.0, 3000.0, 9000.0, 16_000.0)  # a weight and pass of GPTQ, by its grid's p
    nearest: float = 5000.0  # a weight rounded to the nearest point
    trellis: float = 20_000.0  # a code of a sequential grid looked at; 13,000 to 43,000 on four machines
    packed: float = 4500.0  # a weight's codes packed, decoded and kept
    written: float = 450.0  # a weight's codes in the new checkpoint
    factor: float = 3.5  # of n³: the Hessian's Cholesky factor and its inverse, float64
    target: float = 11.0  # of out · in²: target, feedback, first residual
    sweep: float = 3.0  # of out · in²: a refit of scales and a descent
    bfloat16: float = 0.4  # times a float32 product, where the machine multiplies bfloat16; .27 to .55 on three
    onednn: float = 0.45  # the same, of texts that are scored, where `kernels.floats` is quicker
    anew: float = 1.6  # forwards of a block, to each of its inputs from the beginning
    torch: float = 15.0  # times as long as the native library
    read: float = 500.0  # a byte of the original, as the model is loaded

    # Bytes.
    base: float = 0.45 * 2**30  # of Python, torch and transformers
    kept: float = 0.4 * 2**30  # pieces between what stays, that malloc keeps while forwards come and go
    block: float = 3.0  # times the largest block in float32, then
    squares: float = 5.0  # times the largest Gram matrix in float32, then
    model: float = 1.5  # times the float32 model, then, if its blocks cannot be read by themselves; it waits in 16 bits
    folded: float = 3.0  # the same if something is folded first, in float32
    decided: float = 1.5  # times the float32 model, as it writes a text, is searched or measured
    scored: float = 1.9  # the same, as it is scored
    scored_paged: float = 2.4  # times embedding, head and the largest block, as it is scored block by block
    tensor: float = 1.0  # times the largest float32 tensor, as weights are streamed
    coded: float = 0.5  # times the float32 model: its codes, and the embedding in floats
    loaded: float = 1.3  # the same, of the original as it is measured
    pieces: float = 8.0  # times the logits that exist at a time, as a model is tuned


COSTS = Costs()


def read_of(text: Text, problem: Problem) -> Amount:
    """What of a calibration text passes through the blocks for weights."""
    return Amount(problem.sequences_read(text.sequences, text.seq_len), text.seq_len)


def read_by_keys(text: Text, problem: Problem) -> int:
    """Tokens of a calibration text that keys are measured on: some sequences, and the first tokens of all."""
    if not any(scheme.needs_data for scheme in problem.schemes.attentions.values()):
        return 0
    some = min(text.sequences, -(-TOKENS // text.seq_len))
    return some * text.seq_len + text.sequences - some


def count_tokens(text: Text) -> int:
    return text.sequences * text.seq_len
