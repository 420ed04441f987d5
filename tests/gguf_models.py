"""Random models of each family that GGUF files hold, their tokenizer, and quantized folders that fit such a file."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import paley
from paley.format.checkpoint import Checkpoint
from paley.recipe import apply_settings, preset

__all__ = [
    "EXPERTS",
    "FAMILIES",
    "LINEAR",
    "LLAMA3",
    "SIZES",
    "byte_tokenizer",
    "expert_of",
    "file_of",
    "quantized",
    "save",
    "sentencepiece",
]

# Rows of 128 values at least: this llama.cpp multiplies shorter ones of Q4_1 and Q5_1 wrongly.
SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3, "initializer_range": 0.15,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
EXPERTS = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
SLIDES = ["sliding_attention"] * 5 + ["full_attention"]
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama, linear rope, biases": ("LlamaConfig", {"rope_parameters": LINEAR, "attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    "gemma": ("GemmaConfig", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "initializer_range": 0.06, "sliding_window": 8, "layer_types": SLIDES[4:] * 13, "num_hidden_layers": 26,
            "head_dim": 16, "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "sliding_window": 8, "layer_types": SLIDES, "num_hidden_layers": 6, "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, split as GPT-2 does; special tokens, one of which is not."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    pieces = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "er", "Ġt", "Ġth", "on"]
    merges = [("t", "h"), ("e", "r"), ("Ġ", "t"), ("Ġt", "h"), ("o", "n")]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.add_tokens(["<b>"])
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return fast


def sentencepiece() -> PreTrainedTokenizerFast:
    """A BPE of SentencePiece's kind: spaces are part of pieces, unknown characters fall back to bytes."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    letters = [chr(i) for i in range(33, 127)]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁", "a"), ("o", "n"), ("t", "he"), ("▁", "the")]
    joined = list(dict.fromkeys(left + right for left, right in merges))
    pieces = [*special.values(), *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, *joined]
    made = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True,
            fuse_unk=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, **changes: object) -> Path:
    name, own = {**FAMILIES, **EXPERTS}[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **own, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.6, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantized(folder: Path, out: Path, *settings: str, name: str = "gguf-q8_0") -> Path:
    recipe = apply_settings(preset(name), ["test=null", "weights.method=nearest", *settings])
    return paley.quantize(folder, recipe, output=out).output


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def expert_of(plain: Checkpoint, expert: int, name: str) -> torch.Tensor:
    """Of layer 1, whether the checkpoint holds stacks or single experts."""
    place = "model.layers.1.mlp.experts."
    if (single := f"{place}{expert}.{name}.weight") in plain:
        return plain[single]
    if name == "down_proj":
        return plain[f"{place}down_proj"][expert]
    return plain[f"{place}gate_up_proj"][expert].chunk(2)[name == "up_proj"]
