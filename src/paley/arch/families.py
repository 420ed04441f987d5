"""The rows. Adding a family is adding one (docs/adding-a-model.md)."""

from __future__ import annotations

from dataclasses import replace

from paley.arch.row import STREAM, Architecture, Linear, Norm
from paley.core.errors import PaleyError

__all__ = ["FAMILIES", "family"]

_LLAMA = Architecture(
    block=(
        Norm("input_layernorm", STREAM, "attn_input"),
        Linear("self_attn.q_proj", "attn_input", "queries"),
        Linear("self_attn.k_proj", "attn_input", "keys"),
        Linear("self_attn.v_proj", "attn_input", "values"),
        Linear("self_attn.o_proj", "o_input", STREAM),
        Norm("post_attention_layernorm", STREAM, "mlp_input"),
        Linear("mlp.gate_proj", "mlp_input", "gate"),
        Linear("mlp.up_proj", "mlp_input", "up"),
        Linear("mlp.down_proj", "down_input", STREAM),
    )
)

_HEAD_NORMS = (Norm("self_attn.q_norm", "queries", "queries"), Norm("self_attn.k_norm", "keys", "keys"))

FAMILIES = {
    # Mistral without a window is the same decoder with no such rule; nor has it biases.
    "llama": replace(
        _LLAMA,
        ragged={"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
        ragged_excludes=("attention_bias", "mlp_bias"),
    ),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, block=(*_LLAMA.block[:4], *_HEAD_NORMS, *_LLAMA.block[4:])),
    "gemma3_text": Architecture(
        block=(
            *_LLAMA.block[:4],
            *_HEAD_NORMS,
            Linear("self_attn.o_proj", "o_input", "attn_output"),
            Norm("post_attention_layernorm", "attn_output", STREAM),
            Norm("pre_feedforward_layernorm", STREAM, "mlp_input"),
            Linear("mlp.gate_proj", "mlp_input", "gate"),
            Linear("mlp.up_proj", "mlp_input", "up"),
            Linear("mlp.down_proj", "down_input", "mlp_output"),
            Norm("post_feedforward_layernorm", "mlp_output", STREAM),
        ),
        gain_offset=1.0,
        epsilon="eps",
        scaled_embedding=True,
    ),
}


def family(model_type: str) -> Architecture:
    """The row for `model_type`; PaleyError for an unknown one."""
    if model_type not in FAMILIES:
        raise PaleyError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            " (docs/adding-a-model.md tells how to add one)"
        )
    return FAMILIES[model_type]
