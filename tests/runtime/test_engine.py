"""The engine against the transformers path: every family, scheme and way of reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import paley
from paley.core.errors import PaleyError
from paley.model.decoder import ModelDecoder
from paley.recipe import Recipe, apply_settings, preset
from paley.runtime import Engine, why_not
from tiny_models import higgs, save_tiny

TEXT = [1, *range(10, 48)]
FAMILIES = {
    "llama": {},
    "qwen": {"qwen": True},
    "gemma": {"gemma": True},
}
SCHEMES = {
    "w4a16": "higgs-w4a16",
    "higgs-4": "higgs-4",
    "w4a8kv8": "higgs-w4a8kv8",
    "w4a4kv4": "higgs-w4a4kv4",
    "w3a3kv3": "higgs-w3a3kv3",
    "k4v2": "higgs-w4a16k4v2",
}


def recipe(name: str) -> Recipe:
    return higgs(name=name)


def quantized(folder: Path, tokenizer, name: str, *settings: str, **changes) -> Path:
    model = save_tiny(folder / "model", tokenizer, gains=True, max_position_embeddings=512, **changes)
    wanted = apply_settings(recipe(name), settings)
    if changes.get("qwen") is not True and wanted.center_keys == "bias":
        wanted = apply_settings(wanted, ["center_keys=false"])
    paley.quantize(model, wanted, output=folder / "out")
    return folder / "out"


def read(decoder, tokens: list[int]) -> torch.Tensor:
    return decoder.read([(decoder.start(), tokens)])[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, tiny_tokenizer, kind, scheme):
    folder = quantized(tmp_path, tiny_tokenizer, SCHEMES[scheme], **FAMILIES[kind])
    assert why_not(folder) is None
    engine, reference = Engine.open(folder, threads=2), ModelDecoder(paley.load(folder, product="dense"))
    wanted = read(reference, TEXT)
    torch.testing.assert_close(read(engine, TEXT), wanted, atol=2e-4, rtol=2e-4)
