"""The attention function "paley": reads packed keys and values, or rounds plain ones to the identical values.

It enters transformers by AttentionInterface and AttentionMaskInterface; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from paley.arch import FAMILIES
from paley.core.errors import PaleyError, nearest_name
from paley.core.schemes import AttentionScheme
from paley.model.keys import KeyBase, attach_base_
from paley.model.walk import head_widths, is_attention
from paley.ops.attention import PackedKV, kv_attention

__all__ = ["NAME", "attach_schemes", "attention", "check_implementation", "register", "rounds"]

NAME = "paley"


def register() -> None:
    """Makes attn_implementation="paley" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.disable  # as of QuantLinear
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, q, d], key and value [batch, kv_heads, tokens, d] -> ([batch, q, heads, d], None).

    kwargs are those of transformers' sdpa attention, which does the rest. A module without `kv_scheme` is sdpa.
    """
    scheme = getattr(module, "kv_scheme", None) or AttentionScheme()
    if (observer := getattr(module, "key_observer", None)) is not None:
        observer(query, key)
    base: KeyBase | None = getattr(module, "key_base", None) if scheme.keys is not None else None
    held = None
    capped = kwargs.get("softcap") is not None  # what is added to capped scores is no part of them
    if base is not None and isinstance(key, PackedKV) and query.shape[2] == 1 and not capped:  # fewer than keys
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        attention_mask = _added(attention_mask, base.scores(query * scaling, key.shape[2]))
    elif base is not None:
        held = base.held(key.shape[2], query)
    return kv_attention(module, query, key, value, scheme, attention_mask, held, **kwargs)


def _added(mask: Tensor | None, scores: Tensor | None) -> Tensor | None:
    """A mask, true where attention looks or added to scores, with these scores [batch, heads, 1, tokens] added."""
    if mask is None or scores is None:
        return mask if scores is None else scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def attach_schemes(model: PreTrainedModel, attentions: Mapping[str, AttentionScheme]) -> None:
    """Gives the attention modules named (as in `model.named_modules()`) their schemes, and the others none.

    The model's attention implementation becomes "paley". Errors: a name that is no attention module, a scheme
    or transform that does not fit its heads, a model that transformers cannot switch.
    """
    register()
    modules = {name: m for name, m in model.named_modules() if is_attention(m)}
    if model.config.model_type not in FAMILIES and not any(map(rounds, attentions.values())):
        return  # nothing is rounded: the model's own attention stays
    for name, scheme in attentions.items():
        if name not in modules:
            raise PaleyError(f"{name!r} is no attention module of this model{nearest_name(name, modules)}")
        _check_fit(name, modules[name], scheme)
    model.set_attn_implementation(NAME)  # only warns where it cannot
    if any(map(rounds, attentions.values())):
        for part in model.modules():  # whatever else is asked of it later
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation = check_implementation  # type: ignore[method-assign]
    for name, module in modules.items():
        module.kv_scheme = attentions.get(name)  # type: ignore[assignment]
        if _check_still not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check_still)
        attach_base_(model, module, attentions.get(name))
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if module.kv_scheme is not None and implementation != NAME:
            raise PaleyError(
                f"{name}: {type(model).__name__} does not let its attention be replaced (it stays "
                f"{implementation!r}); leave its keys and values unquantized"
            )


def rounds(scheme: AttentionScheme) -> bool:
    """Whether a layer's keys or values are quantized."""
    return scheme.keys is not None or scheme.values is not None


def check_implementation(asked: str | dict[str, Any] | None, *_: Any, **__: Any) -> None:
    """Raises unless the attention asked for, by transformers' names, rounds keys and values: "paley" alone does."""
    wanted = asked.values() if isinstance(asked, dict) else [asked]
    for each in wanted:
        if isinstance(each, dict):
            check_implementation(each)
        elif each not in (None, NAME):
            raise PaleyError(
                f"attn_implementation={each!r} would not round keys and values as this checkpoint wants: leave it out, "
                f"or use {NAME!r}"
            )


def _check_still(module: nn.Module, _: Any) -> None:
    """A hook of attentions: raises if the config was changed behind them."""
    scheme = getattr(module, "kv_scheme", None)
    if scheme is not None and rounds(scheme):
        check_implementation(getattr(module.config, "_attn_implementation", NAME))


def _check_fit(name: str, module: nn.Module, scheme: AttentionScheme) -> None:
    widths = head_widths(module)
    if widths is None:
        raise PaleyError(f"{name}: does not say how wide its heads are; leave its keys and values unquantized")
    if scheme.transform is not None and scheme.transform.in_dim not in widths:
        raise PaleyError(f"{name}: transform.in_dim={scheme.transform.in_dim}, but head_dim={widths[0]}")
    sides = ("keys", scheme.keys, scheme.key_transform), ("values", scheme.values, scheme.value_transform)
    for (what, side, transform), head_dim in zip(sides, widths, strict=True):
        if transform is not None and transform.in_dim != head_dim:
            raise PaleyError(f"{name}: transform.in_dim={transform.in_dim}, but head_dim={head_dim} of its {what}")
        width = head_dim if transform is None else transform.out_dim
        if side is not None and side.group_size is not None and width % side.group_size:
            raise PaleyError(
                f"{name}: {what} of width {width} are not a multiple of group_size={side.group_size}; use a divisor"
            )
