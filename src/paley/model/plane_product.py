"""A linear's product on the bits of its weight and input, where native kernels can: see `paley.core.planes`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paley import kernels
from paley.core import planes
from paley.core.rounding import Quantized
from paley.core.schemes import LinearSlot
from paley.model.inputs import InputCodes

__all__ = ["PlaneWeight", "runs_on_planes"]


def runs_on_planes(slot: LinearSlot, width: int) -> bool:
    """Whether kernels take the slot: weights of four points a group, unsigned 4-bit inputs, the same groups of both."""
    if slot.weight is None or slot.input is None or slot.input.refit:
        return False
    weight, inputs = slot.weight.grid, slot.input.grid
    size = slot.weight.group_size or width
    alike = size == (slot.input.group_size or width)
    four = weight.free and weight.size == 4 and inputs.affine and inputs.size == 16
    return four and alike and kernels.planes_fit(size)


@dataclass(frozen=True)
class PlaneWeight:
    """Beside the packed tensors `parts` of a layer: what the kernel reads, as large as they are but for outliers.

    outliers: float32 [out, k], their weights.
    """

    parts: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    weight: planes.PreparedWeight
    outliers: Tensor | None

    @classmethod
    def of(cls, q: Quantized, parts: tuple[Tensor | None, ...]) -> PlaneWeight:
        """q: the weight that the tensors `parts` stand for."""
        outliers = None if q.outliers is None else q.outliers.dequantize()
        return cls(parts, _versions(parts), planes.prepare(q.codes, q.grid.group_points(q.scales)), outliers)

    def is_of(self, parts: tuple[Tensor | None, ...]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return all(a is b for a, b in zip(self.parts, parts, strict=True)) and self.versions == _versions(parts)

    def product(self, x: InputCodes) -> Tensor:
        """-> float32 [tokens, out]."""
        y = planes.matmul(x.codes, x.scales, x.zeros, self.weight)
        if self.outliers is not None and x.outlier_values is not None:
            y.addmm_(x.outlier_values.float(), self.outliers.T)
        return y


def _versions(parts: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """How often each was written to; inference tensors do not know."""
    return tuple(-1 if part is None or part.is_inference() else part._version for part in parts)
