"""Free grids: each group of a row has its own points, stored in place of its scale. For weights.

W(1+1) of arXiv:2504.05352 is `free2`: a sign bit and a grouping bit choose one of four centroids.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["FreeGrid", "load", "names"]


@dataclass(frozen=True)
class FreeGrid:
    """2^bits points for each group, ascending; mirrored: ±s of half as many scales s, which alone are stored."""

    name: str
    bits: int
    mirrored: bool

    affine: ClassVar[bool] = False
    p: ClassVar[int] = 1

    @property
    def size(self) -> int:
        return 2**self.bits

    @property
    def stored(self) -> int:
        """Numbers that are stored for each group."""
        return self.size // 2 if self.mirrored else self.size

    def points(self, scales: Tensor) -> Tensor:
        """scales [..., stored] ascending -> the points [..., size] that they stand for, ascending."""
        return torch.cat([-scales.flip(-1), scales], -1) if self.mirrored else scales

    def nearest(self, groups: Tensor, scales: Tensor) -> Tensor:
        """groups [..., k], scales [..., stored] -> uint8 codes [..., k] of the nearest points, the lower of two."""
        points = self.points(scales)
        edges = (points[..., 1:] + points[..., :-1]) / 2
        codes = torch.zeros_like(groups, dtype=torch.uint8)
        for edge in edges.unbind(-1):
            codes += (groups > edge[..., None]).view(torch.uint8)
        return codes

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes [..., k], scales [..., stored] -> float32 [..., k]."""
        return self.points(scales.float()).gather(-1, codes.long())


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
