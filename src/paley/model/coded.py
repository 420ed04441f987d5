"""A weight that stays packed, in buffers that have the names of the checkpoint's tensors (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError
from paley.core.rounding import Outliers, Quantized
from paley.core.schemes import LinearScheme
from paley.format.spec import DIAGONAL, PARTS, SCALE_DTYPE, encode_linear, expected_tensors, unpack_weight

__all__ = ["Coded", "parameter"]

_ALL = slice(None)


class Coded(nn.Module):
    """A weight [rows, width]: packed codes, scales, zeros and outliers, or `weight` itself if its scheme has none.

    codes uint8 [rows, bytes] as packed, scales float16 [rows, groups], zeros uint8 [rows, groups] on affine grids, and
    three tensors of outliers if the scheme has any. `width` is the stored one: scheme.transform.out_dim if there is
    a transform. Codes and scales keep their dtypes under any cast.
    """

    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    outliers: Tensor | None
    outlier_scales: Tensor | None
    outlier_columns: Tensor | None
    diagonal: Tensor | None
    weight: nn.Parameter | None

    def __init__(
        self, rows: int, width: int, scheme: LinearScheme, *, dtype: torch.dtype, device: Any, name: str
    ):  # fmt: skip
        """name: what errors call the layer; dtype: of a weight left unquantized."""
        super().__init__()
        self.rows, self.width, self.scheme, self.name = rows, width, scheme, name
        tensors = {
            full.rpartition(".")[2]: torch.zeros(shape, dtype=kind or dtype, device=device)
            for full, (kind, shape) in expected_tensors(name, scheme, width, rows).items()
        }
        for part in (*PARTS, DIAGONAL):
            self.register_buffer(part[1:], tensors.get(part[1:]))
        if self.diagonal is not None:
            self.diagonal.fill_(1)
        self.register_parameter("weight", parameter(tensors.get("weight")))

    @torch.no_grad()
    def set_quantized_(self, q: Quantized) -> None:
        """Packs in q (codes [rows, width / p], scales [rows, groups]); scales must be float16 values."""
        scheme = self.scheme.weight
        if scheme is None:
            raise PaleyError(f"{self.name}: the scheme keeps the weight unquantized, but codes came")
        if q.grid != scheme.grid:
            raise PaleyError(f"{self.name}: the scheme wants codes of {scheme.grid.name!r}, got {q.grid.name!r}")
        if (q.codes.shape[0], q.width) != (self.rows, self.width):
            want, got = (self.rows, self.width), (q.codes.shape[0], q.width)
            raise PaleyError(f"{self.name}: codes must have shape {want}, got {got}")
        if (0 if q.outliers is None else len(q.outliers.columns)) != self.scheme.outliers:
            raise PaleyError(f"{self.name}: the scheme wants {self.scheme.outliers} outlier columns, other codes came")
        for full, tensor in encode_linear(self.name, q).items():
            own = getattr(self, full.rpartition(".")[2])
            if own.shape != tensor.shape:
                raise PaleyError(f"{full}: must have shape {tuple(own.shape)}, got {tuple(tensor.shape)}")
            own.copy_(tensor)

    def take_(self, q: Quantized | None, kept: Tensor) -> None:
        """Packs in q; without it, a scheme that keeps the weight gets a copy of `kept` [rows, width]."""
        if q is not None:
            self.set_quantized_(q)
        elif self.scheme.weight is None:
            self.weight = parameter(kept.detach().clone())
        else:
            raise PaleyError(f"{self.name}: the scheme wants codes of {self.scheme.weight.grid.name!r}, but none came")

    def share_(self, other: Coded) -> Self:
        """Takes the very codes of another, of a tied pair; a state dict has them once, under the other's name."""
        for part in PARTS:
            self.register_buffer(part[1:], getattr(other, part[1:]), persistent=False)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = _ALL) -> Tensor:
        """-> the weight [rows, width], or some of its rows, in `dtype`, computed in float32."""
        q = self.quantized(rows)
        if q is None:
            assert self.weight is not None  # __init__ makes the one or the other
            return self.weight[rows].to(dtype)
        return q.dequantize(dtype)

    def quantized(self, rows: slice = _ALL) -> Quantized | None:
        """The weight's codes, or those of some rows, unpacked; None if it is not quantized."""
        scheme, codes, scales = self.scheme.weight, self.codes, self.scales
        if scheme is None or codes is None or scales is None:
            return None
        unpacked = unpack_weight(codes[rows], scheme.grid, self.width)
        zeros = None if self.zeros is None else self.zeros[rows]
        return Quantized(unpacked, scales[rows], zeros, scheme.grid, self.width, self._quantized_outliers(rows))

    def _quantized_outliers(self, rows: slice) -> Outliers | None:
        if self.outliers is None or self.outlier_scales is None or self.outlier_columns is None:
            return None
        return Outliers(self.outlier_columns, self.outliers[rows], self.outlier_scales[rows])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model (model.bfloat16()) must not round the scales: they follow the device only.
        kept = {name: getattr(self, name) for name in ("scales", "outlier_scales", "diagonal")}
        super()._apply(fn, recurse)
        for name, scales in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != SCALE_DTYPE:
                setattr(self, name, scales.to(moved.device))
        return self


def parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)
