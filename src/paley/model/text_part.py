"""The language model inside a vision-language model's config, as an ordinary causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paley.core.errors import PaleyError

__all__ = ["text_part"]

# Text parts without a causal LM of their own, and the model that computes the same of text: all three positions of
# multimodal RoPE are then those of the token.
_SAME_AS = {
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip
# What the whole model does and that one only if its config says so.
_SAID = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
_MULTIMODAL = ("mrope_section", "mrope_interleaved")


def text_part(folder: Path, config: Any, raw: dict[str, Any]) -> Any:
    """The config itself, or that of its language model. raw: config.json.

    Errors: PaleyError for a text part that is no causal language model.
    """
    inner = config.get_text_config(decoder=True)
    kind = str(_SAME_AS.get(inner.model_type, inner.model_type))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        part = f"the text part of this {config.model_type} model is a {inner.model_type}, which"
        raise PaleyError(
            f"{folder}: {part if inner.model_type != config.model_type else f'a {config.model_type} model'} has no "
            "causal language model in transformers; give the folder of a model that predicts the next token"
        )
    if inner is config:
        return config
    fields = inner.to_dict()
    if kind != inner.model_type:
        known = AutoConfig.for_model(kind).to_dict()
        fields = {key: value for key, value in fields.items() if key in known and key != "model_type"}
        fields |= _SAID.get(inner.model_type, {})
        rope = fields["rope_parameters"]
        kept = {key: value for key, value in rope.items() if key not in _MULTIMODAL}
        fields["rope_parameters"] = kept | ({"rope_type": "default"} if rope.get("rope_type") == "mrope" else {})
    fields.pop("model_type", None)
    part = AutoConfig.for_model(kind, **fields)
    # Which of the two says that the head is tied differs from model to model; one that is silent has a default.
    said = [place.get("tie_word_embeddings") for place in (raw, raw.get("text_config") or {})]
    silent = getattr(config, "tie_word_embeddings", part.tie_word_embeddings)
    part.tie_word_embeddings = next((tied for tied in said if tied is not None), silent)
    part.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    part.dtype = inner.dtype or config.dtype
    return part
