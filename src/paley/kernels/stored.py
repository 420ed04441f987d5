"""A weight whose codes are still packed as a file has them, and what native code is told of one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from torch import Tensor

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid
from paley.core.rounding import Outliers, Quantized, codes_per_row

__all__ = ["MatrixSource", "PackedCodes", "StoredWeight"]


class MatrixSource(ctypes.Structure):
    """paley_matrix_source of csrc/paley.h."""

    _fields_ = [
        ("out", ctypes.c_int32), ("columns", ctypes.c_int32), ("group", ctypes.c_int32), ("segment", ctypes.c_int32),
        ("kind", ctypes.c_int32), ("fine", ctypes.c_int32), ("p", ctypes.c_int32), ("affine", ctypes.c_int32),
        ("points", ctypes.c_int32), ("table_scale", ctypes.c_float), ("table", ctypes.c_void_p),
        ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p), ("own", ctypes.c_void_p),
        ("outliers", ctypes.c_int32), ("outlier_columns", ctypes.c_void_p), ("outlier_values", ctypes.c_void_p),
        ("outlier_scales", ctypes.c_void_p),
    ]  # fmt: skip


class PackedCodes(ctypes.Structure):
    """paley_packed_codes of csrc/paley.h."""

    _fields_ = [
        ("bytes", ctypes.c_void_p), ("row_bytes", ctypes.c_int64), ("per_symbol", ctypes.c_int32),
        ("symbol_bits", ctypes.c_int32), ("size", ctypes.c_int32),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """As `Quantized`, but codes are uint8 [out, bytes] of `packing.pack_codes`. name: for messages."""

    name: str
    codes: Tensor = field(repr=False)
    scales: Tensor
    zeros: Tensor | None
    grid: AnyGrid
    width: int
    outliers: Outliers | None = None

    def unpacked(self) -> Quantized:
        """PaleyError for bytes that no codes can give."""
        try:
            codes = packing.unpack_codes(self.codes, self.grid.size, codes_per_row(self.width, self.grid.p))
        except PaleyError as error:
            raise PaleyError(f"{self.name}: {error}") from None
        return Quantized(codes, self.scales, self.zeros, self.grid, self.width, self.outliers)

    def packed(self, codes: Tensor) -> PackedCodes:
        """codes: this weight's, contiguous; they must live as long as what is returned."""
        per_symbol, bits = packing.symbol(self.grid.size)
        return PackedCodes(codes.data_ptr(), codes.shape[1], per_symbol, bits, self.grid.size)
