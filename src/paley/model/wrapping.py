"""Puts our layers in place of a model's own before it is quantized; what they compute stays the same."""

from __future__ import annotations

from torch import nn

from paley.arch import Site
from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme, LinearScheme, Schemes
from paley.model.adapter import Adapter, Block
from paley.model.attention import attach_schemes
from paley.model.experts import QuantExperts, register_experts, use_experts_
from paley.model.linear import QuantLinear
from paley.model.reading import share_inputs_
from paley.model.stacks import Stack, Turned, put_

__all__ = ["attach_", "set_attention_", "set_input_", "wrap_", "wrap_block_", "wrap_head_"]


def wrap_(adapter: Adapter, schemes: Schemes) -> None:
    """Puts a QuantLinear with its run-time transform in place of every linear; nothing is rounded yet."""
    attach_(adapter, schemes)
    wrap_head_(adapter, schemes)
    for block in adapter.blocks:
        wrap_block_(adapter, block, schemes)


def attach_(adapter: Adapter, schemes: Schemes) -> None:
    """What `wrap_` does to what calls attention, and experts."""
    attach_schemes(adapter.model, schemes.attentions)
    for block in adapter.blocks:
        set_attention_(adapter, block, None)
    register_experts()


def wrap_head_(adapter: Adapter, schemes: Schemes) -> None:
    """What `wrap_` does to the head."""
    head = adapter.sites.head
    if head.stored_as == head.name and schemes.linears[head.name].transform is not None:
        _wrap_linear_(adapter, head, schemes)


def wrap_block_(adapter: Adapter, block: Block, schemes: Schemes) -> None:
    """What `wrap_` does to one block."""
    for site in block.linears():
        _wrap_linear_(adapter, site, schemes)
    share_inputs_(adapter, block.index)


def _wrap_linear_(adapter: Adapter, site: Site, schemes: Schemes) -> None:
    linear, scheme = adapter.module(site.module), schemes.linears[site.name]
    if scheme == LinearScheme() and not isinstance(linear, nn.Linear):
        return  # as it is loaded again
    bare = LinearScheme(transform=scheme.transform, diagonal=scheme.diagonal)
    if isinstance(linear, Stack):
        put_(adapter.model, site.module, QuantExperts.from_stack(linear, bare, None, name=site.name))
        use_experts_(adapter.model)
    elif isinstance(linear, nn.Linear | Turned):
        put_(adapter.model, site.module, QuantLinear.from_linear(linear, bare, None, name=site.name))
    else:
        raise PaleyError(f"{site.name}: is a {type(linear).__name__}, expected a linear layer")


def set_input_(linear: nn.Module, scheme: LinearScheme | None) -> None:
    """Makes a linear round its input as `scheme` says, or not at all; its weight and transform stay."""
    if scheme == LinearScheme() and not isinstance(linear, QuantLinear | QuantExperts):
        return
    assert isinstance(linear, QuantLinear | QuantExperts)
    linear.set_input_(None if scheme is None else scheme.input)


def set_attention_(adapter: Adapter, block: Block, scheme: AttentionScheme | None) -> None:
    """Of all that a block has."""
    for path in block.attentions:
        adapter.module(path).kv_scheme = scheme
