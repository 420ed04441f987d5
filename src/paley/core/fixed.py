"""What grids of fixed points share: each group has a scale and, on affine grids, a zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["Fixed", "code_dtype"]


def code_dtype(size: int) -> torch.dtype:
    """The smallest integers that hold codes below `size`; torch has few operations on uint16."""
    if size <= 2**8:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int64


class Fixed:
    """The part of a grid's protocol that follows from `nearest` and `decode`; FreeGrid has the same members.

    free: each group has its own points, stored instead of its scale. mirrored: only the positive ones of them are
    stored. scale_shape: the shape of what is stored for a group. sequential: what a code stands for depends on its
    whole row.
    """

    free: ClassVar[bool] = False
    mirrored: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    scale_shape: ClassVar[tuple[int, ...]] = ()

    if TYPE_CHECKING:
        # Grids define these as fields or properties.
        @property
        def p(self) -> int: ...

        @property
        def size(self) -> int: ...

        def nearest(self, vectors: Tensor, /) -> Tensor: ...

        def decode(self, codes: Tensor, /) -> Tensor: ...

    @property
    def code_dtype(self) -> torch.dtype:
        return code_dtype(self.size)

    def vectors(self, groups: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """groups [..., g, k], scales and zeros [..., g, 1] -> a copy at the grid's scale [..., ceil(g * k / p), p]."""
        y = groups / scales
        if zeros is not None:
            y += zeros
        y = y.flatten(-2)
        if missing := -y.shape[-1] % self.p:
            y = torch.nn.functional.pad(y, (0, missing))
        return y.unflatten(-1, (y.shape[-1] // self.p, self.p))

    def quantize(self, groups: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """groups [..., g, k], scales [..., g, *scale_shape or 1], zeros [..., g, 1] -> nearest codes [..., c].

        c: ceil(g * k / p).
        """
        vectors = self.vectors(groups, scales, zeros)
        return self.nearest(vectors.flatten(0, -2)).view(vectors.shape[:-1])

    def look_up(self, codes: Tensor, n: int | None = None) -> Tensor:
        """codes [..., c] -> their points, float32 [..., n]; n: c * p unless given."""
        values = self.decode(codes).flatten(-2)
        return values if n is None else values[..., :n]

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, n: int | None = None) -> Tensor:
        """codes [..., c], scales [..., g, *scale_shape], zeros [..., g] -> float32 [..., n]; n: c * p unless given."""
        values = self.look_up(codes, n).unflatten(-1, (scales.shape[-1], -1))
        if zeros is not None:
            values = values - zeros.float()[..., None]
        return (values * scales.float()[..., None]).flatten(-2)

    def group_points(self, scales: Tensor) -> Tensor:
        """scales [..., g, *scale_shape] -> the points [..., g, size] of each group; for p = 1, without zeros."""
        return self.look_up(torch.arange(self.size, device=scales.device)) * scales[..., None]

    def check_scales(self, scales: Tensor, where: str) -> None:
        """Raises unless a file's scales [..., g, *scale_shape] can be those of a weight."""
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise PaleyError(f"{where}: must be positive and finite, and are not; the file is damaged")

    def check_width(self, width: int, where: str) -> None:
        """Raises for rows of so many values that the grid cannot have."""

    def check_scaled(self, where: str) -> None:
        """Raises if the points do not fit values of variance 1, which scales by rms need."""
