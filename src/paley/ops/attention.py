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

__all__ = ["SCALE_DTYPE", "PackedKV", "centered", "kv_attention", "pack_kv"]

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


def pack_kv(x: Tensor, scheme: ActivationScheme, transform: Transform | None = None) -> PackedKV:
    """x [batch, kv_heads, tokens, head_dim] -> codes and scales per token and head (and group), detached."""
    q = rounding.quantize_dynamic(x.detach(), scheme, SCALE_DTYPE, transform=transform)
    codes = packing.pack_codes(q.codes, scheme.grid.size)
    return PackedKV(codes, q.scales, q.zeros, q.width, scheme, transform)


def centered(keys: Tensor, scheme: AttentionScheme, mean: Tensor | None) -> Tensor:
    """keys [batch, kv_heads, tokens, head_dim] less mean [kv_heads, head_dim], if the scheme asks for it."""
    if scheme.keys is None or not scheme.center_keys or mean is None:
        return keys
    return keys - mean.to(keys.dtype)[:, None]


def kv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    scheme: AttentionScheme,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, q, d], key and value [batch, kv_heads, tokens, d] -> ([batch, q, heads, d], None).

    Plain keys and values are rounded to what a cache would hold. The meaning of every kernel: decode, then the
    attention of transformers, whose arguments `module`, `attention_mask` and `kwargs` are.
    """
    # Unquantized keys need no rotation: it cancels in q . k, and leaving it out is exact.
    transform = scheme.transform if scheme.keys is not None else None
    query = rounding.round_trip(query, None, transform=transform)
    key = _read(key, scheme.keys, transform, query, "keys")
    value = _read(value, scheme.values, None, query, "values")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _read(
    x: Tensor | PackedKV,
    scheme: ActivationScheme | None,
    transform: Transform | None,
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
        return x.dequantize(query.dtype)
    if scheme is None:
        return x
    return rounding.round_trip(x, scheme, SCALE_DTYPE, transform=transform)
