"""What is stored, to the byte: nothing left unquantized goes unmentioned."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from paley.format.checkpoint import Checkpoint
from paley.model.calibrate import LayerReport
from paley.model.loading import Source
from paley.plan import Plan

__all__ = ["parameter_count", "quantized_bits", "untouched"]


def parameter_count(source: Source) -> int:
    """Values stored in the original checkpoint; a tied weight counts once."""
    return sum(prod(source.checkpoint.shape(name)) for name in source.checkpoint.names)


def quantized_bits(reports: Iterable[LayerReport], source: Source) -> float | None:
    """Bits per original weight of the quantized linears: codes, scales, zeros, expansion; None where there are none."""
    bits = weights = 0
    for report in reports:
        bits += report.stored_bits
        weights += prod(source.checkpoint.shape(f"{report.name}.weight"))
    return bits / weights if weights else None


def untouched(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    """Name -> number of values, of every tensor left unquantized; vectors and mean keys as one entry each."""
    quantized = {name for name, slot in plan.linears.items() if slot.weight is not None}
    found: dict[str, int] = {}
    for name, info in checkpoint.infos.items():
        layer, _, part = name.rpartition(".")
        if layer in quantized and part != "bias":
            continue
        entry = "mean keys" if part == "key_mean" else name if len(info.shape) > 1 else "norms and biases"
        found[entry] = found.get(entry, 0) + prod(info.shape)
    return found
