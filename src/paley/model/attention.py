"""The attention function "paley": reads packed keys and values, or rounds plain ones to the identical values.

It enters transformers by AttentionInterface and AttentionMaskInterface; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paley.core import rounding
from paley.core.errors import PaleyError, nearest_name
from paley.core.schemes import ActivationScheme, AttentionSlot
from paley.core.transforms import Transform
from paley.model.kv_cache import SCALE_DTYPE, PackedKV, centered

__all__ = ["NAME", "attach_slots", "attention", "register"]

NAME = "paley"


def register() -> None:
    """Makes attn_implementation="paley" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, q, d], key and value [batch, kv_heads, tokens, d] -> ([batch, q, heads, d], None).

    kwargs are those of transformers' sdpa attention, which does the rest. A module without `kv_slot` is sdpa.
    """
    slot = getattr(module, "kv_slot", None) or AttentionSlot()
    # Unquantized keys need no rotation: it cancels in q . k, and leaving it out is exact.
    transform = slot.transform if slot.keys is not None else None
    if transform is not None:
        query = transform.apply(query)
    if isinstance(key, Tensor):
        if (observer := getattr(module, "key_observer", None)) is not None:
            observer(key)
        key = centered(key, slot, getattr(module, "key_mean", None))
    key = _read(key, slot.keys, transform, query, "keys")
    value = _read(value, slot.values, None, query, "values")
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
                f"attention: the cache holds {what} as {x.scheme}, {x.transform}, but the module's slot says "
                f"{scheme}, {transform}; build a new PackedKVCache after changing slots"
            )
        return x.dequantize(query.dtype)
    if scheme is None:
        return x
    if transform is not None:
        x = transform.apply(x)
    return rounding.round_trip(x.contiguous(), scheme, SCALE_DTYPE)


def attach_slots(model: PreTrainedModel, attentions: Mapping[str, AttentionSlot]) -> None:
    """Gives the attention modules named (as in `model.named_modules()`) their slots, and the others none.

    The model's attention implementation becomes "paley". Errors: a name that is no attention module, a scheme
    or transform that does not fit its heads, a model that transformers cannot switch.
    """
    register()
    modules = {name: m for name, m in model.named_modules() if _is_attention(m)}
    for name, slot in attentions.items():
        if name not in modules:
            raise PaleyError(f"{name!r} is no attention module of this model{nearest_name(name, modules)}")
        _check_fit(name, modules[name], slot)
    register()
    model.set_attn_implementation(NAME)  # only warns where it cannot
    for name, module in modules.items():
        module.kv_slot = attentions.get(name)  # type: ignore[assignment]
        module.register_buffer("key_mean", _empty_mean(module, attentions.get(name)))
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if module.kv_slot is not None and implementation != NAME:
            raise PaleyError(
                f"{name}: {type(model).__name__} does not let its attention be replaced (it stays "
                f"{implementation!r}); leave its keys and values unquantized"
            )


def _empty_mean(module: nn.Module, slot: AttentionSlot | None) -> Tensor | None:
    """Zeros [kv_heads, head_dim] where the slot wants a mean key, to be calibrated or read from a file."""
    if slot is None or slot.keys is None or not slot.center_keys:
        return None
    heads, head_dim = int(module.config.num_key_value_heads), int(module.head_dim)  # type: ignore[union-attr, arg-type]
    return torch.zeros(heads, head_dim, device=next(chain(module.parameters(), module.buffers())).device)


def _is_attention(module: nn.Module) -> bool:
    """What transformers' attention modules have in common: a place in the cache and a causality."""
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")


def _check_fit(name: str, module: nn.Module, slot: AttentionSlot) -> None:
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    key_width = head_dim
    if slot.transform is not None:
        if slot.transform.in_dim != head_dim:
            raise PaleyError(f"{name}: transform.in_dim={slot.transform.in_dim}, but head_dim={head_dim}")
        key_width = slot.transform.out_dim
    for what, scheme, width in (("keys", slot.keys, key_width), ("values", slot.values, head_dim)):
        if scheme is not None and scheme.group_size is not None and width % scheme.group_size:
            raise PaleyError(
                f"{name}: {what} of width {width} are not a multiple of group_size={scheme.group_size}; use a divisor"
            )
