"""kv_attention: scaled dot-product attention over keys and values as a cache holds them, packed or plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.rounding import codes_per_row
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.core.transforms import Transform
from paley.ops import rounding

__all__ = ["SCALE_DTYPE", "PackedKV", "kv_attention", "pack_kv"]

SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class PackedKV:
    """Keys or values [batch, kv_heads, tokens, width] as stored, after `transform`.

    codes uint8 [batch, kv_heads, tokens, bytes]; scales float16 [batch, kv_heads, tokens,
    groups]; zeros uint8, shaped as scales, on affine grids only.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    width: int
    scheme: ActivationScheme
    transform: Transform | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of these tokens' codes, scales and zeros."""
        return sum(t.nbytes for t in self.parts())

    def parts(self) -> list[Tensor]:
        """codes, scales, and zeros where there are any."""
        return [t for t in (self.codes, self.scales, self.zeros) if t is not None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> [batch, kv_heads, tokens, width] in `dtype`, still in transform's coordinates."""
        grid = self.scheme.grid
        codes = packing.unpack_codes(self.codes, grid.size, codes_per_row(self.width, grid.p))
        return grid.dequantize(codes, self.scales, self.zeros, self.width).to(dtype)


def pack_kv(
    x: Tensor, scheme: ActivationScheme, transform: Transform | None = None, base: Tensor | None = None
) -> PackedKV:
    """x [batch, kv_heads, tokens, head_dim] -> codes and scales per token and head (and group), detached.

    base [1 or batch, kv_heads, tokens, width]: taken off first, in transform's coordinates.
    """
    x, ahead = _without(x.detach(), transform, base)
    q = rounding.quantize_dynamic(x, scheme, SCALE_DTYPE, transform=ahead)
    codes = packing.pack_codes(q.codes, scheme.grid.size)
    return PackedKV(codes, q.scales, q.zeros, q.width, scheme, transform)


def kv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    scheme: AttentionScheme,
    attention_mask: Tensor | None,
    base: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, q, d], key and value [batch, kv_heads, tokens, d] -> ([batch, q, heads, d], None).

    Plain keys and values are rounded to what a cache would hold. The meaning of every kernel: decode, then the
    attention of transformers, whose arguments `module`, `attention_mask` and `kwargs` are.
    base [1 or batch, kv_heads, tokens, width]: what keys are rounded without, in the coordinates of scheme.transform;
    packed keys lack it already.
    """
    query = rounding.round_trip(query, None, transform=scheme.key_transform)
    key = _read(key, scheme.keys, scheme.key_transform, base, query, "keys")
    value = _read(value, scheme.values, scheme.value_transform, None, query, "values")
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    back = scheme.value_transform
    return output if back is None else rounding.turn_back(output, back), None


def _read(
    x: Tensor | PackedKV,
    scheme: ActivationScheme | None,
    transform: Transform | None,
    base: Tensor | None,
    query: Tensor,
    what: str,
) -> Tensor:
    """x, packed or plain -> what a cache holds of it, [batch, kv_heads, tokens, width] in query's dtype."""
    if isinstance(x, PackedKV):
        if (x.scheme, x.transform) != (scheme, transform):
            raise PaleyError(
                f"attention: the cache holds {what} as {x.scheme}, {x.transform}, but the module's scheme says "
                f"{scheme}, {transform}; build a new PackedKVCache after changing schemes"
            )
        x = x.dequantize(query.dtype)
    elif scheme is None:
        return x
    else:
        x, ahead = _without(x, transform, base)
        x = rounding.round_trip(x, scheme, SCALE_DTYPE, transform=ahead)
    return x if base is None else x + base


def _without(x: Tensor, transform: Transform | None, base: Tensor | None) -> tuple[Tensor, Transform | None]:
    """-> x without base, if there is one, and the transform that is still ahead of it."""
    return (x, transform) if base is None else (rounding.round_trip(x, None, transform=transform) - base, None)
