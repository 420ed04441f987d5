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
from tiny_models import change_config


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


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.c_attn.scale", "transformer.h.1.mlp.experts.0.w1", "transformer.wte.norm"]
)
def test_tensors_that_no_place_takes_are_named(name, tmp_path):
    save_type("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(PaleyError, match=rf"1 tensors too many, the first is {name}; use the config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(("layers", "complaint"), [(200, "no tensor"), (10**6, "n_layer is 1,000,000, but")])
def test_more_layers_than_the_weights_have(layers, complaint, tmp_path):
    """Some families run a block several times, so that a few hundred are not refused at once."""
    save_type("gpt2", tmp_path)
    with pytest.raises(PaleyError, match=complaint):
        open_source(change_config(tmp_path, n_layer=layers))


@pytest.mark.parametrize(("kind", "key"), [("mpt", "n_layers"), ("bart", "decoder_layers"), ("bart", "encoder_layers")])
def test_layers_by_any_name_are_counted(kind, key, tmp_path):
    """Making a million of them would take minutes, and gigabytes."""
    save_type(kind, tmp_path)
    with pytest.raises(PaleyError, match=f"{key} is 1,000,000, but the weights have 2 layers"):
        open_source(change_config(tmp_path, **{key: 10**6}))


def test_why_a_linear_stays_is_known():
    """A module that reads a linear's weight, or its type, cannot have it coded."""
    kept = sites_of(tiny_model("falcon_mamba")).kept
    assert "also read" in kept["backbone.layers.0.mixer.x_proj"]
    assert not sites_of(tiny_model("falcon")).kept  # linears with a forward of their own that do nothing else
