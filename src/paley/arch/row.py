"""What a row says of a family: a decoder block as norms and linears between named wires.

A wire is a tensor that flows through the block. Everything else follows from who writes and who reads it:
which linears share an input, which gains can be folded, whether the residual stream can be rotated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HEAD_INPUT", "STREAM", "Architecture", "Linear", "Norm", "Part", "rope_follows_length", "window"]

STREAM = "stream"  # the residual stream
HEAD_INPUT = "head_input"  # what the final norm gives to the head


@dataclass(frozen=True)
class Norm:
    """An RMSNorm at `path` (from the block). A norm over single heads reads and writes the same wire."""

    path: str
    reads: str
    writes: str

    @property
    def over_heads(self) -> bool:
        return self.reads == self.writes


@dataclass(frozen=True)
class Linear:
    """A linear layer at `path` (from the block). One that writes to the stream adds to it."""

    path: str
    reads: str
    writes: str


Part = Norm | Linear


@dataclass(frozen=True)
class Architecture:
    """A family. Paths of `embedding`, `blocks`, `norm`, `head` and `rotary` start at the model, the others at a block.

    block: its parts in the order of computation. Attention turns the wires `queries`, `keys` and `values` into
    `attended`; the gated MLP turns `gate` and `up` into `gated`.
    gain_offset: a norm multiplies by gain_offset + weight. epsilon: the attribute of a norm's module.
    scaled_embedding: rows are multiplied by the square root of the hidden size when they are looked up.
    ragged: what a config says instead if the hidden size is no multiple of the heads, which the family's config class
    refuses; and the settings that this excludes. Empty: the class takes it.
    """

    block: tuple[Part, ...]
    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    queries: str = "queries"
    keys: str = "keys"
    values: str = "values"
    attended: str = "o_input"
    up: str = "up"
    gated: str = "down_input"
    gain_offset: float = 0.0
    epsilon: str = "variance_epsilon"
    scaled_embedding: bool = False
    ragged: Mapping[str, Any] = field(default_factory=dict)
    ragged_excludes: tuple[str, ...] = ()

    def linears(self) -> Iterator[Linear]:
        return (part for part in self.block if isinstance(part, Linear))

    def norms(self) -> Iterator[Norm]:
        return (part for part in self.block if isinstance(part, Norm))

    def writer(self, wire: str) -> Linear:
        """The linear that makes `wire`."""
        return next(part for part in self.linears() if part.writes == wire)

    def made_by(self, wire: str) -> str:
        """Path of the last part that writes `wire`."""
        return [part.path for part in self.block if part.writes == wire][-1]

    def norm_of(self, wire: str) -> Norm | None:
        """The norm whose output `wire` is; None if another part makes it."""
        return next((n for n in self.norms() if n.writes == wire and not n.over_heads), None)

    def stream_norm_before(self, linear: Linear) -> Norm:
        """The last norm before `linear` that reads the stream: it sees the stream as it is before the linear adds."""
        before = self.block[: self.block.index(linear)]
        return [part for part in before if isinstance(part, Norm) and part.reads == STREAM][-1]

    def why_stream_is_fixed(self) -> str | None:
        """Why the residual stream cannot be rotated by folding: which norm stands in the way; None if none does."""
        for part in self.norms():
            if part.writes == STREAM:
                return f"the gain of {part.path} stands between a linear layer and the residual stream"
        return None

    @property
    def values_rotate(self) -> bool:
        """Whether a rotation of each value head can be folded into the linears around attention (R2)."""
        return not any(norm.reads == self.values for norm in self.norms())

    def sizes(self, config: Any) -> dict[str, int]:
        """Wire -> its width. config: the model's configuration as transformers has it, or anything like it."""
        head_dim = self.head_dim(config)
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        return {
            STREAM: config.hidden_size, HEAD_INPUT: config.hidden_size,
            self.queries: queries, self.keys: keys, self.values: keys, self.attended: queries,
            "gate": config.intermediate_size, self.up: config.intermediate_size, self.gated: config.intermediate_size,
        }  # fmt: skip

    def embedding_scale(self, config: Any) -> float:
        """What rows of the embedding are multiplied by."""
        return config.hidden_size**0.5 if self.scaled_embedding else 1.0

    def head_dim(self, config: Any) -> int:
        """From the config if it is explicit (Qwen3, Gemma), else hidden size / heads."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window(config: Any, block: int) -> int | None:
    """Tokens that attention of a block looks back, itself included; None if it sees all. config: any family's."""
    tokens = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[block] == "sliding_attention" if kinds else tokens is not None
    return tokens if slides else None


def rope_follows_length(config: Any) -> bool:
    """Whether RoPE turns a token by other angles in a longer text, so that its place alone does not tell them."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(part for part in found.values() if isinstance(part, Mapping))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in kinds)
