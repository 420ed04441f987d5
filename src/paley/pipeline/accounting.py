"""What is stored, to the byte: nothing left unquantized goes unmentioned."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import nn

from paley.model.calibrate import LayerReport
from paley.model.loading import Source

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


def untouched(model: nn.Module) -> dict[str, int]:
    """Name -> number of values, of every parameter left unquantized; vectors and mean keys as one entry each."""
    left = dict(model.named_parameters())
    found = {name: p.numel() for name, p in left.items() if p.dim() > 1}
    if vectors := sum(p.numel() for p in left.values() if p.dim() <= 1):
        found["norms and biases"] = vectors
    if means := sum(b.numel() for name, b in model.named_buffers() if name.endswith(".key_mean")):
        found["mean keys"] = means
    return found
