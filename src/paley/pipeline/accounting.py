"""What is stored, to the byte: nothing left unquantized goes unmentioned."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

from paley.format.checkpoint import Checkpoint
from paley.format.header import TensorInfo
from paley.model.keys import MEAN_KEYS
from paley.model.loading import Source
from paley.model.problem import Problem

__all__ = ["parameter_count", "quantized_bits", "untouched"]


def parameter_count(source: Source, carried: Mapping[str, TensorInfo] = MappingProxyType({})) -> int:
    """Values of the original that are stored in some form; a tied weight counts once, however often it is stored."""
    return sum(prod(info.shape) for info in (*source.checkpoint.infos.values(), *carried.values()))


def quantized_bits(problem: Problem) -> float | None:
    """Stored bits for each original value of the weights that the recipe quantizes; None if it quantizes none.

    Codes, scales, zeros and expansion count, and at its full width what the budget chose to keep; what an override
    keeps does not.
    """
    counted = [site for site in problem.sites.weights if site.name in problem.wanted]
    values = sum(site.numel for site in counted)
    return 8 * sum(map(problem.stored_bytes, counted)) / values if values else None


def untouched(checkpoint: Checkpoint, problem: Problem) -> dict[str, int]:
    """Name -> number of values, of every tensor left unquantized; vectors and mean keys as one entry each."""
    quantized = {name for name, scheme in problem.schemes.linears.items() if scheme.weight is not None}
    found: dict[str, int] = {}
    for name, info in checkpoint.infos.items():
        layer, _, part = name.rpartition(".")
        if layer in quantized and part != "bias":
            continue
        entry = "mean keys" if part in MEAN_KEYS else name if len(info.shape) > 1 else "norms and biases"
        found[entry] = found.get(entry, 0) + prod(info.shape)
    return found
