"""What is stored, to the byte: nothing left unquantized goes unmentioned."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import nn

from paley.core import grids
from paley.model.calibrate import LayerReport
from paley.model.linear import QuantLinear
from paley.model.loading import Source

__all__ = ["parameter_count", "quantized_bits", "untouched"]


def parameter_count(source: Source) -> int:
    """Values stored in the original checkpoint; a tied weight counts once."""
    return sum(prod(source.checkpoint.shape(name)) for name in source.checkpoint.names)


def quantized_bits(reports: Iterable[LayerReport]) -> float | None:
    """Bits per weight of the quantized linears alone: codes, scales and zeros; None where there are none."""
    bits = weights = 0
    for report in reports:
        q = report.quantized
        rows, columns = q.codes.shape
        packed = -(-columns * int(grids.load(q.grid).bits) // 8)
        bits += 8 * (rows * packed + q.scales.nbytes + (0 if q.zeros is None else q.zeros.nbytes))
        weights += rows * columns
    return bits / weights if weights else None


def untouched(model: nn.Module) -> dict[str, int]:
    """Name -> number of values, of every parameter that no quantizer took; vectors are summed up as one entry."""
    coded = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.codes is not None}
    left = {name: p for name, p in model.named_parameters() if name not in coded}
    found = {name: p.numel() for name, p in left.items() if p.dim() > 1}
    if vectors := sum(p.numel() for p in left.values() if p.dim() <= 1):
        found["norms and biases"] = vectors
    return found
