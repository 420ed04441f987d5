"""A tiny config of each family that has a row, with what could go wrong going wrong: windows, caps, multipliers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers

from paley.arch import FAMILIES

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def _config(name: str, alternate: bool, own: dict[str, Any], **settings: Any) -> Any:
    sizes = SIZES | own | settings
    if alternate:
        sizes |= {"sliding_window": 8, "layer_types": _ALTERNATE[: sizes["num_hidden_layers"]]}
    if "no_rope_layers" in sizes:
        sizes["no_rope_layers"] = sizes["no_rope_layers"][: sizes["num_hidden_layers"]]
    return getattr(transformers, name)(**sizes)


MOE = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")


def _made(name: str, *, alternate: bool = False, **own: Any) -> Callable[..., Any]:
    return partial(_config, name, alternate, own)


# model_type -> a function that makes its config, with some settings changed.
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _made("LlamaConfig"),
    "mistral": _made("MistralConfig", sliding_window=8, head_dim=16),
    "ministral": _made("MinistralConfig", alternate=True, head_dim=16),
    "ministral3": _made("Ministral3Config", head_dim=16, rope_parameters=_YARN),
    "qwen2": _made("Qwen2Config"),
    "qwen3": _made("Qwen3Config", head_dim=16),
    "smollm3": _made("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "granite": _made(
        "GraniteConfig", embedding_multiplier=6.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=3.0
    ),
    "phi3": _made("Phi3Config", sliding_window=8, rope_parameters=_ROPE | {"partial_rotary_factor": 0.5}),
    "glm": _made("GlmConfig", head_dim=16, attention_bias=True, rope_parameters=_ROPE | {"partial_rotary_factor": 0.5}),
    "glm4": _made(
        "Glm4Config", head_dim=16, attention_bias=True, rope_parameters=_ROPE | {"partial_rotary_factor": 0.5}
    ),
    "qwen3_moe": _made(
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "mixtral": _made("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _made("OlmoeConfig", num_experts=4, num_experts_per_tok=2, clip_qkv=1.5),
    "gpt_oss": _made(
        "GptOssConfig",
        alternate=True,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        rope_parameters=_YARN,
    ),
    "ernie4_5": _made("Ernie4_5Config", use_bias=True, head_dim=16),
    "olmo2": _made("Olmo2Config"),
    "olmo3": _made("Olmo3Config", alternate=True),
    "gemma": _made("GemmaConfig", head_dim=16),
    "gemma2": _made("Gemma2Config", alternate=True, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **_GEMMA),
    "gemma3_text": _made("Gemma3TextConfig", final_logit_softcapping=3.0, **_GEMMA),
}


def plain_attention(kind: str) -> str:
    """What transformers computes the family's attention with."""
    return "eager" if FAMILIES[kind].attention_softcap or FAMILIES[kind].sinks else "sdpa"
