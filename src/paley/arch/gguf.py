"""What GGUF files of each family say, as data: llama.cpp's name of it, its keys and tensors, and how its RoPE turns.

One table serves both ways: writing a file, and reading one. Names of tensors are the gguf package's own table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from paley.arch.row import STREAM

__all__ = ["ALIKE", "FLOATS", "GGUF", "KEYS", "NO_BOS", "ROPE_FACTORS", "SPLITS", "GgufFamily", "Token", "family_of"]

Pairs = Literal["halves", "interleaved"]

ROPE_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides each frequency by

# Key after the architecture's name -> the config's attribute. A family's own are beside.
KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


# Keys of float32, as llama.cpp wants them; the config may have whole numbers there.
FLOATS = frozenset({
    "attention.layer_norm_rms_epsilon", "attention.scale", "embedding_scale", "residual_scale", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping",
})  # fmt: skip


@dataclass(frozen=True)
class GgufFamily:
    """One family in GGUF.

    architecture: llama.cpp's name. pairs: of a head's values, those that its RoPE turns together; queries and keys of a
    family that says otherwise (`Architecture.rotary_pairs`) are in another order in the file. keys: as KEYS, of this
    family alone. windows: every so many layers one sees all tokens and the others have a window; 1: none has one.
    rope_every: every so many layers one has no RoPE; 0: all have it. local_theta: RoPE's base in layers with a window,
    which no key tells. activation: of the gate. biased: wires whose linears may have a bias. heads_fill: the heads of
    queries together are as wide as the stream. always: keys of one value. fixed: attributes of the config that can only
    have these values.
    """

    architecture: str
    pairs: Pairs
    keys: Mapping[str, str] = field(default_factory=dict)
    windows: int = 1
    rope_every: int = 0
    local_theta: float | None = None
    activation: str = "silu"
    biased: tuple[str, ...] = ()
    heads_fill: bool = False
    always: Mapping[str, bool] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


_GEMMA_WINDOW = {"attention.sliding_window": "sliding_window"}
_QKV = ("queries", "keys", "values")
_GELU = "gelu_pytorch_tanh"
_GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

GGUF: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", "interleaved", biased=(*_QKV, STREAM)),
    "mistral": GgufFamily("llama", "interleaved"),
    "smollm3": GgufFamily("smollm3", "interleaved", rope_every=4),
    "qwen2": GgufFamily("qwen2", "halves", biased=_QKV, heads_fill=True),
    "qwen3": GgufFamily("qwen3", "halves"),
    "qwen3_moe": GgufFamily(
        "qwen3moe", "halves",
        keys={
            "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        fixed={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "mixtral": GgufFamily(
        "llama", "interleaved",
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "granite": GgufFamily(
        "granite", "interleaved", biased=_QKV, keys=_GRANITE, always={"rope.scaling.finetuned": True},
    ),
    "gemma": GgufFamily("gemma", "halves", activation=_GELU),
    "gemma2": GgufFamily("gemma2", "halves", windows=2, keys=_GEMMA_WINDOW | _CAPS, activation=_GELU),
    "gemma3_text": GgufFamily(
        "gemma3", "halves", windows=6, local_theta=10000.0, keys=_GEMMA_WINDOW, activation=_GELU,
    ),
}  # fmt: skip

_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name of a way to split text -> the steps of Hugging Face's tokenizer that do the same.
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "qwen2": [_split(_QWEN), _BYTES | {"use_regex": False}],
    "llama-bpe": [_split(_LLAMA3), _BYTES | {"use_regex": False}],
}

# Other names of the same.
ALIKE = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm",
    "refact": "smollm", "command-r": "smollm",
}  # fmt: skip

# Of these no text begins with a special token, though files name one: put there, it doubles the perplexity of Qwen.
NO_BOS = ("qwen2",)


class Token(IntEnum):
    """Kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def family_of(architecture: str) -> str | None:
    """The `model_type` that a file of llama.cpp's architecture is read as; None: Paley reads none."""
    return next((kind for kind, family in GGUF.items() if family.architecture == architecture), None)
