"""Quantized tiny models for the tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paley
from paley.recipe import apply_settings
from tiny_models import higgs, save_tiny

FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen": {"qwen": True}}


def quantized(folder: Path, tokenizer: Any, recipe: str, *settings: str, **changes: Any) -> Path:
    """A tiny model of 512 positions, quantized without data; settings of the recipe, changes of the config."""
    model = save_tiny(folder / "model", tokenizer, gains=True, **{"max_position_embeddings": 512} | changes)
    wanted = higgs(name=recipe)
    if not changes.get("qwen") and wanted.center_keys == "bias":  # there is none
        wanted = apply_settings(wanted, ["center_keys=false"])
    paley.quantize(model, apply_settings(wanted, settings), output=folder / "out")
    return folder / "out"
