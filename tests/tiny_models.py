"""Random models in folders, and the recipe for their widths, for the tests that quantize without a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from paley.recipe import Recipe, apply_settings, preset

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_tiny(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, qwen: bool = False, gemma: bool = False, gains: bool = False,
    dtype: torch.dtype = torch.float32, **changes: object,
) -> Path:  # fmt: skip
    """A model of two layers; MLP width 37 is no multiple of any block. Qwen has biases, Gemma a window; both are tied.

    gains: norms multiply by something else than one.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": qwen or gemma, "initializer_range": 0.2,
    }  # fmt: skip
    if gemma:
        settings |= {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        settings |= {"pad_token_id": 3, "initializer_range": 0.05}
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if qwen else (LlamaForCausalLM, LlamaConfig)
    kind, config = (Gemma3ForCausalLM, Gemma3TextConfig) if gemma else (kind, config)
    model = kind(config(**settings | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif gains and parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.25, 1.75)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
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


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Rewrites a folder's tensors, all of them in one file: change(old) -> new."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in (*files, *folder.glob("*.index.json")):
        file.unlink()
    new = {name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **changes: object) -> Path:
    """Sets keys of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))
    return folder


def unseal(folder: Path) -> Path:
    """Takes a quantized folder's digests away, as in those that an older Paley wrote."""
    (folder / "digests.json").unlink()
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    section.pop("digest", None)
    return change_config(folder, quantization_config=section)
