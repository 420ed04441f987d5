"""Free grids: each group of a row has its own points, stored instead of its scale. For weights only.

W(1+1) of arXiv:2504.05352 is `free2`: a sign bit and a grouping bit choose one of four centroids.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["FreeGrid", "load", "names"]


@dataclass(frozen=True)
class FreeGrid:
    """2^bits points for each group, ascending. mirrored: the points are ±s, and only the scales s are stored."""

    name: str
    bits: int
    mirrored: bool

    free: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    affine: ClassVar[bool] = False
    gaussian: ClassVar[bool] = False
    packaged: ClassVar[bool] = True
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    p: ClassVar[int] = 1

    @property
    def size(self) -> int:
        return 2**self.bits

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """(stored,): how many numbers are stored for each group."""
        return (self.size // 2 if self.mirrored else self.size,)

    def group_points(self, scales: Tensor) -> Tensor:
        """scales [..., stored] ascending -> the points [..., size], ascending."""
        return torch.cat([-scales.flip(-1), scales], -1) if self.mirrored else scales

    def quantize(self, groups: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """groups [..., g, k], scales [..., g, stored] -> uint8 codes [..., g * k] of the nearest points.

        Ties go to the lower point. zeros is ignored.
        """
        points = self.group_points(scales)
        edges = (points[..., 1:] + points[..., :-1]) / 2
        codes = torch.zeros_like(groups, dtype=torch.uint8)
        for edge in edges.unbind(-1):
            codes += (groups > edge[..., None]).view(torch.uint8)
        return codes.flatten(-2)

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, n: int | None = None) -> Tensor:
        """codes [..., n], scales [..., g, stored] -> float32 [..., n]."""
        codes = codes.unflatten(-1, (scales.shape[-2], -1))
        return self.group_points(scales.float()).gather(-1, codes.long()).flatten(-2)

    def check_width(self, width: int, where: str) -> None:
        """Raises for rows of so many values that the grid cannot have."""

    def check_scales(self, scales: Tensor, where: str) -> None:
        """Raises unless a file's scales [..., g, stored] can be those of a weight."""
        points = self.group_points(scales.float())
        if not bool(scales.isfinite().all()) or bool((points.diff(dim=-1) < 0).any()):
            raise PaleyError(f"{where}: points must be finite and ascend, and do not; the file is damaged")


@functools.cache
def _all() -> dict[str, FreeGrid]:
    kinds = {"free": False, "mirror": True}
    return {f"{k}{b}": FreeGrid(f"{k}{b}", b, mirrored) for k, mirrored in kinds.items() for b in range(1, 5)}


def names() -> list[str]:
    """`free1` to `free4`, `mirror1` to `mirror4`."""
    return list(_all())


def load(name: str) -> FreeGrid:
    """One of `names()`."""
    return _all()[name]
