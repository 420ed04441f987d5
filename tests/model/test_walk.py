"""Models without a row: what is found in them, and what is said where nothing can be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from every_type import save_type, tiny_model
from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.model.walk import sites_of


def test_what_a_walk_finds():
    sites = sites_of(tiny_model("afmoe"))
    assert sites.architecture.walked
    assert "has no row" in sites.architecture.why_stream_is_fixed()
    stacks = [site for site in sites.of("linear") if site.experts]
    assert {site.tensor.rpartition(".")[2] for site in stacks} == {"gate_up_proj", "down_proj"}
    assert all(site.shape[0] % site.experts == 0 for site in stacks)
    assert len(sites.of("keys")) == len(sites.of("values")) > 0


def test_blocks_that_cannot_be_found_are_named():
    model = tiny_model("gpt2")
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(PaleyError, match=r"'gpt2': its 2 decoder blocks cannot be found.*adding-a-model"):
        sites_of(model)


def test_experts_of_unequal_shapes_are_named(tmp_path):
    save_type("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts.1." in n)
    tensors[name] = torch.zeros(3, tensors[name].shape[1])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PaleyError, match=r"experts\.1\..* has shape \[3, 64\], but .*get the checkpoint's original"):
        open_source(tmp_path)
