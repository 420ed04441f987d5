"""Mixtures of experts in whole runs: what no text reaches, and what is measured and decided by layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_family_runs import SMALL, save_family
from test_sources import Notes

from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.pipeline import make_plan, quantize
from paley.pipeline.sensitivities import measure_sensitivity
from paley.recipe import apply_settings, preset
from tiny_models import change_tensors, higgs

LAYER = "model.layers.{}.mlp.experts.{}"
STACKS = [LAYER.format(block, part) for block in (0, 1) for part in ("gate_up_proj", "down_proj")]


def save_with_idle_experts(folder, tokenizer):
    """Of six experts two take a token: scores are a·x, -a·x, b·x, -b·x, of which two are above the last ones' 0."""
    model = save_family(folder, "mixtral", tokenizer, num_local_experts=6)

    def route(tensors):
        for name in [name for name in tensors if name.endswith((".gate.weight", ".router.weight"))]:
            a, b = torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
            tensors[name] = torch.stack([a, -a, b, -b, 0 * a, 0 * a])
        return tensors

    return change_tensors(model, route)


def codes(folder, name):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return next(t for n, t in tensors.items() if n.startswith(f"{name}.") and t.dtype == torch.uint8).unflatten(
        0, (6, -1)
    )


def test_experts_that_no_text_reaches_are_rounded_to_nearest_and_named(tmp_path, tiny_tokenizer):
    model = save_with_idle_experts(tmp_path / "model", tiny_tokenizer)
    settings = [*SMALL, "test=null", "embedding=null", "head=null", "weights.grid=int4", "weights.group_size=16"]
    heard = Notes()
    made, plain = (
        quantize(
            model, apply_settings(preset("w4a16"), [*settings, f"weights.method={method}"]), output=tmp_path / method,
            monitor=heard,
        ).output
        for method in ("gptq", "nearest")
    )  # fmt: skip
    said = [note for note in heard.notes if "reached no" in note]
    assert [note.partition(":")[0] for note in said] == STACKS
    assert all("reached no 4, 5 of its experts, which are rounded to nearest" in note for note in said)
    for name in STACKS:
        ours, nearest = codes(made, name), codes(plain, name)
        assert torch.equal(ours[4:], nearest[4:])
        assert not torch.equal(ours[:4], nearest[:4])


def test_a_stack_has_one_slope_and_one_grid(tmp_path, tiny_tokenizer):
    """Of all experts together: there are models with tens of thousands."""
    model = save_family(tmp_path / "model", "mixtral", tiny_tokenizer)
    slopes = measure_sensitivity(model, source="random", sequences=2, seq_len=24)
    assert {site for site in slopes.slots if "experts" in site} == set(STACKS)
    budget = higgs("budget={weights: 4}")
    plan = make_plan(model, budget, sensitivity=slopes)
    assert {name for name in plan.linears if "experts" in name} == set(STACKS)


def test_experts_that_do_not_make_up_a_stack_are_named(tmp_path, tiny_tokenizer):
    model = save_family(tmp_path / "model", "mixtral", tiny_tokenizer)
    lost = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    change_tensors(model, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    with pytest.raises(PaleyError, match=r"experts.* do not make up .*gate_up_proj.*; use the config.json"):
        open_source(model)
