"""Greedy tokens of a trained model: the engine's are those of the transformers path."""

from __future__ import annotations

import pytest
import torch

import paley
from paley.kernels import matmul
from paley.model.decoder import ModelDecoder
from paley.recipe import apply_settings, preset
from paley.runtime import Engine


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["higgs-4", "higgs-w4a8kv8"])
def test_greedy_tokens(shared_dir, tmp_path, recipe, monkeypatch):
    wanted = apply_settings(preset(recipe), ["test=null", "hadamard=64", "center_keys=false"])
    paley.quantize(shared_dir / "models" / "ref-llama", wanted, output=tmp_path / "out")
    monkeypatch.setattr(matmul, "plan", lambda *_: None)  # integers add .01 of the loss that the weights' rounding is
    engine, reference = Engine.open(tmp_path / "out"), ModelDecoder(paley.load(tmp_path / "out", product="dense"))
    for start in (5, 900, 4000):
        mine, its, found = engine.start(), reference.start(), ([], [])
        token_of = [start, start]
        for _ in range(40):
            for i, (decoder, context) in enumerate(((engine, mine), (reference, its))):
                token_of[i] = int(torch.argmax(decoder.read([(context, [token_of[i]])])[0]))
                found[i].append(token_of[i])
        assert found[0] == found[1]
