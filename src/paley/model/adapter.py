"""Architectures as a table: where the parts of a decoder are. Algorithms see an Adapter, never Llama.

Adding an architecture is adding a row, if it is a pre-norm decoder with RMSNorm, rotary positions and a gated
MLP (docs/adding-a-model.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from paley.core.errors import PaleyError, nearest_name

__all__ = ["ARCHITECTURES", "Adapter", "Architecture", "Block"]


@dataclass(frozen=True)
class Architecture:
    """Module paths: embedding, blocks, norm, head from the model; the others from a block."""

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    head_norms: tuple[tuple[str, str], ...] = ()  # (role, path of the RMSNorm over its heads)


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(head_norms=(("q", "self_attn.q_norm"), ("k", "self_attn.k_norm"))),
}

# Linears that read one and the same tensor, in the order the block computes them: (input slot, roles).
SHARED_INPUTS = (("attn", ("q", "k", "v")), ("o", ("o",)), ("mlp", ("gate", "up")), ("down", ("down",)))

# Linears that write to the residual stream, and the norm that read the stream as it was before they add to it.
RESIDUAL_WRITERS = {"o": "attention_norm", "down": "mlp_norm"}


@dataclass(frozen=True)
class Block:
    """One decoder block: its path in the model, its module, and the paths of its parts within it."""

    index: int
    name: str
    module: nn.Module
    architecture: Architecture = field(repr=False)

    def path(self, role: str) -> str:
        """Full path in the model of the part `role`, such as 'q' or 'attention_norm'."""
        return f"{self.name}.{getattr(self.architecture, role)}"

    def part(self, role: str) -> Any:
        return self.module.get_submodule(getattr(self.architecture, role))

    def head_norms(self) -> Iterator[tuple[str, Any]]:
        """(role, module) of each RMSNorm over single heads (Qwen3)."""
        for role, path in self.architecture.head_norms:
            yield role, self.module.get_submodule(path)

    def linears(self) -> Iterator[tuple[str, str]]:
        """(role, full path) of each linear, in the order the block computes them."""
        for _, roles in SHARED_INPUTS:
            for role in roles:
                yield role, self.path(role)


class Adapter:
    """A model seen through its row of ARCHITECTURES."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.architecture = architecture(model.config.model_type)
        stack = model.get_submodule(self.architecture.blocks)
        self.blocks = [
            Block(i, f"{self.architecture.blocks}.{i}", block, self.architecture)
            for i, block in enumerate(stack.children())
        ]

    def part(self, role: str) -> Any:
        """A part of the whole model: 'embedding', 'norm' or 'head'."""
        return self.model.get_submodule(getattr(self.architecture, role))

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def intermediate_size(self) -> int:
        return self.model.config.intermediate_size

    @property
    def num_heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.model.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """From the config where it is explicit (Qwen3, Nemo), not hidden_size / heads."""
        return getattr(self.model.config, "head_dim", None) or self.hidden_size // self.num_heads


def architecture(model_type: str) -> Architecture:
    """The row for `model_type`; an unknown one is refused by name."""
    if model_type not in ARCHITECTURES:
        raise PaleyError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
            f"{nearest_name(model_type, ARCHITECTURES)} (docs/adding-a-model.md tells how to add one)"
        )
    return ARCHITECTURES[model_type]
