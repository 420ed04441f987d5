"""What a row says of a family: a decoder block as norms and linears between named wires.

A wire is a tensor that flows through the block. Everything else follows from who writes and who reads it:
which linears share an input, which gains can be folded, whether the residual stream can be rotated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["HEAD_INPUT", "STREAM", "Architecture", "Linear", "Norm", "Part", "Tap", "rope_follows_length", "window"]

STREAM = "stream"  # the residual stream
HEAD_INPUT = "head_input"  # what the final norm gives to the head


@dataclass(frozen=True)
class Norm:
    """An RMSNorm at `path` (from the block). One that reads and writes the same wire is over single heads, each with
    the same gain; `whole`: over all heads of a token together, with a gain for each value.
    """

    path: str
    reads: str
    writes: str
    whole: bool = False

    @property
    def over_heads(self) -> bool:
        return self.reads == self.writes


@dataclass(frozen=True)
class Linear:
    """A linear layer at `path` (from the block). One that writes to the stream adds to it.

    parts: the wires that a fused layer makes, in the order of its rows; `writes` then names all of them together.
    experts: the config's number of them, of a layer that is a stack of matrices, one for each; it is a parameter of
    a module of experts, [E, out, in], or, transposed, [E, in, out]. kept: a router, which is never quantized.
    """

    path: str
    reads: str
    writes: str
    parts: tuple[str, ...] = ()
    experts: str = ""
    transposed: bool = False
    kept: bool = False

    def makes(self, wire: str) -> bool:
        return wire == self.writes or wire in self.parts


@dataclass(frozen=True)
class Tap:
    """Linears read the stream as it is, without a norm before them, on the wire `writes`."""

    writes: str
    reads: str = STREAM


Part = Norm | Linear | Tap


@dataclass(frozen=True)
class Architecture:
    """A family. Paths of `embedding`, `blocks`, `norm`, `head` and `rotary` start at the model, the others at a block.

    block: its parts in the order of computation. Attention turns the wires `queries`, `keys` and `values` into
    `attended`; the gated MLP turns `gate` and `up` into `gated`.
    gain_offset: a norm multiplies by gain_offset + weight. epsilon: the attribute of a norm's module.
    scaled_embedding: rows are multiplied by the square root of the hidden size when they are looked up.
    ragged: what a config says instead if the hidden size is no multiple of the heads, which the family's config class
    refuses; and the settings that this excludes. Empty: the class takes it.

    The rest names attributes of the config; "" if the family has none. activation: of the gate.
    query_scalar, attention_multiplier: scores are multiplied by the first to the power -1/2, or by the second, in place
    of the head's size to the power -1/2. attention_softcap, logit_softcap: c in c · tanh(x / c), of scores and logits.
    embedding_multiplier: what looked-up rows are multiplied by. residual_multiplier: what a block's linears add is
    multiplied by it. logit_divisor: logits are divided by it. clip: queries, keys and values are cut off at ±clip
    before RoPE. rope_layers: a list with 1 for each layer that has RoPE. rotary: pairs (i, i + n/2) turn together, or
    "interleaved" ones (2i, 2i + 1); rotary_half: the model's tables hold each angle once. query_growth: an entry of
    rope_parameters by which queries grow with the position. sinks: a parameter of attention, a score for each head that
    no value belongs to. gate_limits: alpha and limit c of a gate (up + 1) · g · sigmoid(alpha · g), with g cut off at c
    and up at ±c; gate and up take turns in the rows of the fused layer.

    heads_follow: the sizes of heads' norms follow from the hidden size, so that a stream cannot be widened.

    dense: the block of layers without experts, which are those that the list `dense_layers` names, and all but each
    `sparse_step`-th. expert_width: the width of an expert's gate.
    """

    block: tuple[Part, ...]
    family: str = ""
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
    gate: str = "gate"
    up: str = "up"
    gated: str = "down_input"
    gain_offset: float = 0.0
    epsilon: str = "variance_epsilon"
    scaled_embedding: bool = False
    ragged: Mapping[str, Any] = field(default_factory=dict)
    ragged_excludes: tuple[str, ...] = ()
    activation: str = "hidden_act"
    query_scalar: str = ""
    attention_multiplier: str = ""
    attention_softcap: str = ""
    logit_softcap: str = ""
    embedding_multiplier: str = ""
    residual_multiplier: str = ""
    logit_divisor: str = ""
    clip: str = ""
    rope_layers: str = ""
    rotary_pairs: Literal["halves", "interleaved"] = "halves"
    rotary_half: bool = False
    query_growth: str = ""
    sinks: str = ""
    gate_limits: tuple[str, str] | None = None
    heads_follow: bool = False
    dense: tuple[Part, ...] = ()
    dense_layers: str = ""
    sparse_step: str = ""
    expert_width: str = "intermediate_size"

    @property
    def walked(self) -> bool:
        """Whether there is no row: the sites come from walking the model's modules, and nothing is known of wires."""
        return not self.block

    def at(self, config: Any, index: int) -> Architecture:
        """The row of one block: families with experts may have layers without."""
        alone = getattr(config, self.dense_layers, None) or () if self.dense_layers else ()
        step = getattr(config, self.sparse_step, None) or 1 if self.sparse_step else 1
        if not self.dense or (index not in alone and (index + 1) % step == 0):
            return self
        return replace(self, block=self.dense, dense=(), expert_width="intermediate_size")

    def linears(self) -> Iterator[Linear]:
        """Those that can be quantized; routers are `routers`."""
        return (part for part in self.block if isinstance(part, Linear) and not part.kept)

    def routers(self) -> Iterator[Linear]:
        return (part for part in self.block if isinstance(part, Linear) and part.kept)

    def norms(self) -> Iterator[Norm]:
        return (part for part in self.block if isinstance(part, Norm))

    def writer(self, wire: str) -> Linear:
        """The linear that makes `wire`, alone or as a part."""
        return next(part for part in self.linears() if part.makes(wire))

    def maker(self, wire: str) -> Norm | Linear:
        """The last part that writes `wire`."""
        norms = [norm for norm in self.norms() if norm.writes == wire]
        return norms[-1] if norms else self.writer(wire)

    def made_by(self, wire: str) -> str:
        """Path of the last part that writes `wire`."""
        return self.maker(wire).path

    def rows(self, wire: str, config: Any) -> slice:
        """Which outputs of the linear that makes `wire` are it."""
        linear, sizes = self.writer(wire), self.sizes(config)
        start = 0
        for part in linear.parts if wire in linear.parts else ():
            if part == wire:
                break
            start += sizes[part]
        return slice(start, start + sizes[wire])

    def norm_of(self, wire: str) -> Norm | None:
        """The norm whose output `wire` is; None if another part makes it."""
        return next((n for n in self.norms() if n.writes == wire and not n.over_heads), None)

    def stream_norm_before(self, linear: Linear) -> Norm:
        """The last norm before `linear` that reads the stream: it sees the stream as it is before the linear adds."""
        before = self.block[: self.block.index(linear)]
        return [part for part in before if isinstance(part, Norm) and part.reads == STREAM][-1]

    def why_stream_is_fixed(self) -> str | None:
        """Why the residual stream cannot be rotated by folding: which norm stands in the way; None if none does."""
        if self.walked:
            return f"{self.family!r} has no row that says what reads and writes it"
        for part in self.norms():
            if part.writes == STREAM:
                return f"the gain of {part.path} stands between a linear layer and the residual stream"
        return None

    def values_rotate(self, config: Any) -> bool:
        """Whether a rotation of each value head can be folded into the linears around attention (R2)."""
        return not any(norm.reads == self.values for norm in self.norms()) and not self.clips(config)

    def clips(self, config: Any) -> bool:
        """Whether queries, keys and values are cut off, so that none of them may be rotated or scaled by folding."""
        return bool(self.clip) and getattr(config, self.clip, None) is not None

    def sizes(self, config: Any) -> dict[str, int]:
        """Wire -> its width. config: the model's configuration as transformers has it, or anything like it."""
        head_dim = self.head_dim(config)
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        sizes = {
            STREAM: config.hidden_size, HEAD_INPUT: config.hidden_size,
            self.queries: queries, self.keys: keys, self.values: keys, self.attended: queries,
            **dict.fromkeys((self.gate, self.up, self.gated), getattr(config, self.expert_width)),
        }  # fmt: skip
        return sizes | {part.writes: sum(sizes[wire] for wire in part.parts) for part in self.linears() if part.parts}

    def embedding_scale(self, config: Any) -> float:
        """What rows of the embedding are multiplied by as they are looked up."""
        return self.scale_at(config.hidden_size)

    def scale_at(self, width: int) -> float:
        """The same of a model whose residual stream has so many values."""
        return width**0.5 if self.scaled_embedding else 1.0

    def number(self, config: Any, name: str, default: float | None = None) -> Any:
        """The config's value of one of the row's attributes, such as `residual_multiplier`; default if it has none."""
        attribute = getattr(self, name)
        value = getattr(config, attribute, None) if attribute else None
        return default if value is None else float(value)

    def attention_scale(self, config: Any) -> float:
        """What scores q · k are multiplied by."""
        multiplier = self.number(config, "attention_multiplier")
        return multiplier or self.number(config, "query_scalar", self.head_dim(config)) ** -0.5

    def has_rope(self, config: Any, block: int) -> bool:
        """Whether RoPE turns queries and keys of a block."""
        return not self.rope_layers or bool(getattr(config, self.rope_layers)[block])

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
