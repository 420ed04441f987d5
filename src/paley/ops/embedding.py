"""embed: rows of a coded embedding, decoded as they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core import packing
from paley.core.rounding import Quantized, codes_per_row
from paley.core.schemes import LinearScheme
from paley.ops.rounding import turn_back

__all__ = ["embed"]


def embed(ids: Tensor, parts: dict[str, Tensor], scheme: LinearScheme, width: int, dtype: torch.dtype) -> Tensor:
    """ids int64 [...] -> rows [..., in_dim] in `dtype`, computed in float32.

    parts: codes uint8 [vocab, bytes], scales [vocab, ...] and zeros as stored. The rows are stored turned: row = Tᵀ ŵ.
    """
    assert scheme.weight is not None
    grid, flat = scheme.weight.grid, ids.flatten()
    codes = packing.unpack_codes(parts["codes"].index_select(0, flat), grid.size, codes_per_row(width, grid.p))
    zeros = parts.get("zeros")
    rows = Quantized(
        codes,
        parts["scales"].index_select(0, flat),
        None if zeros is None else zeros.index_select(0, flat),
        grid,
        width,
    ).dequantize()
    if scheme.transform is not None:
        rows = turn_back(rows, scheme.transform)
    return rows.to(dtype).view(*ids.shape, rows.shape[-1])
