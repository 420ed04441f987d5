"""Random models in folders, and the recipe for their widths, for the tests that quantize without a text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from paley.recipe import Recipe, apply_settings, preset

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerBase, *, qwen: bool = False, **changes: object) -> Path:
    """A model of two layers; MLP width 37 is no multiple of any block, and Qwen has biases and ties its embeddings."""
    torch.manual_seed(0)
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if qwen else (LlamaForCausalLM, LlamaConfig)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": qwen, "initializer_range": 0.2,
    }  # fmt: skip
    model = kind(config(**settings | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def store_tie_as(folder: Path, *names: str) -> Path:
    """Stores a tied model's embedding under these of its two names; transformers and Paley write EMBEDDING alone."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if EMBEDDING in tensors:
            embedding = tensors.pop(EMBEDDING)
            save_file(tensors | {name: embedding.clone() for name in names}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        file = found["weight_map"].pop(EMBEDDING)
        found["weight_map"] |= dict.fromkeys(names, file)
        index.write_text(json.dumps(found))
    return folder


def higgs(*settings: str, name: str = "higgs-3") -> Recipe:
    """A preset that needs no text, unscored, in Hadamard blocks that fit the tiny models."""
    return apply_settings(preset(name), ["test=null", "hadamard=16", *settings])
