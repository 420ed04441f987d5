"""The rows. Adding a family is adding one (docs/adding-a-model.md)."""

from __future__ import annotations

from dataclasses import replace

from paley.arch.row import STREAM, Architecture, Linear, Norm, Part, Tap
from paley.core.errors import PaleyError

__all__ = ["FAMILIES", "family"]

_QKV = (
    Linear("self_attn.q_proj", "attn_input", "queries"),
    Linear("self_attn.k_proj", "attn_input", "keys"),
    Linear("self_attn.v_proj", "attn_input", "values"),
)
_O = Linear("self_attn.o_proj", "o_input", STREAM)
_O_TO_NORM = replace(_O, writes="attn_output")
_GATE_UP = (Linear("mlp.gate_proj", "mlp_input", "gate"), Linear("mlp.up_proj", "mlp_input", "up"))
_FUSED_GATE_UP = Linear("mlp.gate_up_proj", "mlp_input", "gate_up", parts=("gate", "up"))
_DOWN = Linear("mlp.down_proj", "down_input", STREAM)
_DOWN_TO_NORM = replace(_DOWN, writes="mlp_output")
_ATTN_NORM = Norm("input_layernorm", STREAM, "attn_input")
_MLP_NORM = Norm("post_attention_layernorm", STREAM, "mlp_input")
_HEAD_NORMS = (Norm("self_attn.q_norm", "queries", "queries"), Norm("self_attn.k_norm", "keys", "keys"))
_WHOLE_NORMS = tuple(replace(norm, whole=True) for norm in _HEAD_NORMS)

_LLAMA = Architecture(block=(_ATTN_NORM, *_QKV, _O, _MLP_NORM, *_GATE_UP, _DOWN))


def _after_both(*, heads: tuple[Norm, ...] = ()) -> tuple[Part, ...]:
    """A block with norms before and after attention and MLP, as Gemma has it."""
    return (
        _ATTN_NORM, *_QKV, *heads, _O_TO_NORM, Norm("post_attention_layernorm", "attn_output", STREAM),
        Norm("pre_feedforward_layernorm", STREAM, "mlp_input"), *_GATE_UP, _DOWN_TO_NORM,
        Norm("post_feedforward_layernorm", "mlp_output", STREAM),
    )  # fmt: skip


_GEMMA = replace(_LLAMA, gain_offset=1.0, epsilon="eps", scaled_embedding=True, activation="hidden_act")
_GEMMA2 = replace(
    _GEMMA, block=_after_both(), activation="hidden_activation", query_scalar="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
)  # fmt: skip
_OLMO2 = Architecture(
    block=(
        Tap("attn_input"), *_QKV, *_WHOLE_NORMS, _O_TO_NORM, Norm("post_attention_layernorm", "attn_output", STREAM),
        Tap("mlp_input"), *_GATE_UP, _DOWN_TO_NORM, Norm("post_feedforward_layernorm", "mlp_output", STREAM),
    )
)  # fmt: skip


def _experts(count: str, router: str = "mlp.gate", *, transposed: bool = False) -> tuple[Part, ...]:
    """A router and stacks of experts, in place of an MLP."""
    return (
        Linear(router, "mlp_input", "routing", kept=True),
        Linear(
            "mlp.experts.gate_up_proj", "mlp_input", "gate_up", parts=("gate", "up"), experts=count,
            transposed=transposed,
        ),
        Linear("mlp.experts.down_proj", "down_input", STREAM, experts=count, transposed=transposed),
    )  # fmt: skip


_QWEN3 = replace(_LLAMA, block=(_ATTN_NORM, *_QKV, *_HEAD_NORMS, *_LLAMA.block[4:]))

FAMILIES = {
    # Mistral without a window is the same decoder with no such rule; nor has it biases.
    "llama": replace(
        _LLAMA,
        ragged={"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
        ragged_excludes=("attention_bias", "mlp_bias"),
    ),
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": replace(_LLAMA, query_growth="llama_4_scaling_beta"),
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _LLAMA, block=(_ATTN_NORM, *_QKV, *_HEAD_NORMS, _O, _MLP_NORM, *_experts("num_experts")), dense=_QWEN3.block,
        dense_layers="mlp_only_layers", sparse_step="decoder_sparse_step", expert_width="moe_intermediate_size",
    ),
    "mixtral": replace(_LLAMA, block=(_ATTN_NORM, *_QKV, _O, _MLP_NORM, *_experts("num_local_experts"))),
    "olmoe": replace(
        _LLAMA, block=(_ATTN_NORM, *_QKV, *_WHOLE_NORMS, _O, _MLP_NORM, *_experts("num_experts")), clip="clip_qkv",
        heads_follow=True,
    ),
    "gpt_oss": replace(
        _LLAMA,
        block=(
            _ATTN_NORM, *_QKV, _O, _MLP_NORM, *_experts("num_local_experts", "mlp.router", transposed=True),
        ),
        activation="", gate_limits=("swiglu_alpha", "swiglu_limit"), rotary_half=True, sinks="sinks",
    ),
    "smollm3": replace(_LLAMA, rope_layers="no_rope_layers"),
    "granite": replace(
        _LLAMA, attention_multiplier="attention_multiplier", embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier", logit_divisor="logits_scaling",
    ),
    "phi3": Architecture(
        block=(
            _ATTN_NORM,
            Linear("self_attn.qkv_proj", "attn_input", "qkv", parts=("queries", "keys", "values")),
            _O, _MLP_NORM, _FUSED_GATE_UP, _DOWN,
        )
    ),
    "glm": Architecture(
        block=(_ATTN_NORM, *_QKV, _O, _MLP_NORM, _FUSED_GATE_UP, _DOWN), rotary_pairs="interleaved",
    ),
    "glm4": Architecture(
        block=(
            _ATTN_NORM, *_QKV, _O_TO_NORM, Norm("post_self_attn_layernorm", "attn_output", STREAM),
            _MLP_NORM, _FUSED_GATE_UP, _DOWN_TO_NORM, Norm("post_mlp_layernorm", "mlp_output", STREAM),
        ),
        rotary_pairs="interleaved",
    ),
    "ernie4_5": replace(_LLAMA, rotary_pairs="interleaved"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, block=_after_both(heads=_HEAD_NORMS), attention_softcap=""),
}  # fmt: skip


def family(model_type: str) -> Architecture:
    """The row for `model_type`; PaleyError for an unknown one."""
    if model_type not in FAMILIES:
        raise PaleyError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            " (docs/adding-a-model.md tells how to add one)"
        )
    return FAMILIES[model_type]
