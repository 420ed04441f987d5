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
from paley.kernels import gpu
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
    back = scheme.value_transform
    if base is None and isinstance(key, PackedKV) and isinstance(value, PackedKV) and gpu.chosen(query.device):
        _check_held(key, scheme.keys, scheme.key_transform, "keys")
        _check_held(value, scheme.values, scheme.value_transform, "values")
        if _on_gpu(module, query, key, value, attention_mask, kwargs):
            from paley.kernels.gpu.attention import attention

            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            output = attention(query, key, value, attention_mask, scaling).transpose(1, 2)
            return output if back is None else rounding.turn_back(output, back), None
    key = _read(key, scheme.keys, scheme.key_transform, base, query, "keys")
    value = _read(value, scheme.values, scheme.value_transform, None, query, "values")
    output = _attend(module, query, key, value, attention_mask, **kwargs)
    return output if back is None else rounding.turn_back(output, back), None


# Arguments of transformers' attention functions that change nothing here: masks and caches come otherwise.
_UNUSED = {
    "position_ids", "sliding_window", "output_attentions", "output_hidden_states", "use_cache", "cache_position",
    "return_dict", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "cu_seqlens", "is_causal",
}  # fmt: skip


def _on_gpu(
    module: nn.Module, query: Tensor, key: PackedKV, value: PackedKV, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether the Triton kernel computes it: no gradients, soft cap, sinks or biases, and a mask if it is causal."""
    from paley.kernels.gpu.attention import takes

    if query.requires_grad or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return False
    if kwargs.get("dropout") or any(name not in _UNUSED | {"scaling", "dropout"} for name in _given(kwargs)):
        return False
    causal = mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
    return not causal and takes(key.scheme, key.width) and takes(value.scheme, value.width)


def _given(kwargs: dict[str, Any]) -> list[str]:
    """Names of arguments that may change scores."""
    return [name for name, given in kwargs.items() if isinstance(given, Tensor | float)]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' sdpa attention; with a soft cap of scores, or sinks [heads], which that passes over, in steps.

    Errors: PaleyError for an argument that may change scores, and is none of these.
    """
    if unknown := [name for name in _given(kwargs) if name not in _UNUSED]:
        raise PaleyError(
            f"attention: {type(module).__name__} gives its attention {unknown[0]}, which Paley's does not know; leave "
            "keys and values unquantized"
        )
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=kwargs.get("is_causal"),
            position_bias=position_bias,
        )[0]  # fmt: skip
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is None and tokens > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:  # one more score, whose value is zero
        sinks = s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.cat([scores, sinks], -1).softmax(-1, torch.float32 if scores.dtype.itemsize < 4 else None)
        probabilities = probabilities[..., :-1]
    else:
        probabilities = scores.softmax(-1, torch.float32 if scores.dtype.itemsize < 4 else None)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2)


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
        _check_held(x, scheme, transform, what)
        x = x.dequantize(query.dtype)
    elif scheme is None:
        return x
    else:
        x, ahead = _without(x, transform, base)
        x = rounding.round_trip(x, scheme, SCALE_DTYPE, transform=ahead)
    return x if base is None else x + base


def _check_held(x: PackedKV, scheme: ActivationScheme | None, transform: Transform | None, what: str) -> None:
    if (x.scheme, x.transform) != (scheme, transform):
        raise PaleyError(
            f"attention: the cache holds {what} as {x.scheme}, {x.transform}, but the module's scheme says "
            f"{scheme}, {transform}; build a new PackedKVCache after changing schemes"
        )


def _without(x: Tensor, transform: Transform | None, base: Tensor | None) -> tuple[Tensor, Transform | None]:
    """-> x without base, if there is one, and the transform that is still ahead of it."""
    return (x, transform) if base is None else (rounding.round_trip(x, None, transform=transform) - base, None)
