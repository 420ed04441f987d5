"""Quantized tiny models for the tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import paley
from family_configs import CONFIGS
from paley.recipe import apply_settings
from tiny_models import higgs, save_tiny


def of_family(folder: Path, tokenizer: Any, kind: str, **changes: Any) -> Path:
    """A random model of a family; norms and biases are those of no other family."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.1}
    sizes |= {"num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes | changes), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.25, 1.75)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantized(folder: Path, tokenizer: Any, recipe: str, *settings: str, family: str = "", **changes: Any) -> Path:
    """A tiny model of 512 positions, quantized without data; settings of the recipe, changes of the config."""
    if family:
        model = of_family(folder / "model", tokenizer, family, **changes)
    else:
        model = save_tiny(folder / "model", tokenizer, gains=True, **{"max_position_embeddings": 512} | changes)
    wanted = higgs(name=recipe)
    if not changes.get("qwen") and wanted.center_keys == "bias":  # there is none
        wanted = apply_settings(wanted, ["center_keys=false"])
    paley.quantize(model, apply_settings(wanted, settings), output=folder / "out")
    return folder / "out"
