"""Mixtures of experts in whole runs: what no text reaches, and what is measured and decided by layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_family_runs import SMALL, save_family
from test_sources import FP8_CONFIG, Notes, in_fp8, make, weights

from every_type import save_type
from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source
from paley.pipeline import make_plan, quantize
from paley.pipeline.sensitivities import measure_sensitivity
from paley.recipe import apply_settings, preset
from tiny_models import change_config, change_tensors, higgs

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


def test_tuning_tells_of_the_stacks_that_it_leaves(tmp_path, tiny_tokenizer):
    model, heard = save_family(tmp_path / "model", "mixtral", tiny_tokenizer), Notes()
    settings = [*SMALL, "test=null", "tune={sequences: 2}"]
    out = quantize(model, apply_settings(preset("w4a16"), settings), output=tmp_path / "out", monitor=heard).output
    assert any(note.startswith("4 stacks of experts keep their scales") for note in heard.notes)
    assert Checkpoint.open(out)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_experts_in_fp8_are_quantized_as_their_decoded_weights_are(kind, tmp_path, tiny_tokenizer):
    """A matrix and its factors for each expert in the file, a stack in the model; with a row and without."""
    folder = tmp_path / "model"
    if kind == "qwen3_moe":
        save_family(folder, kind, tiny_tokenizer, mlp_only_layers=[])
    else:
        save_type(kind, folder)
    stored, plain = in_fp8(Checkpoint.open(folder))
    assert sum(".experts." in name and name.endswith("_scale_inv") for name in stored) >= 12
    change_tensors(folder, lambda _: plain)
    expected, _ = make(folder)
    change_tensors(folder, lambda _: stored)
    change_config(folder, quantization_config=FP8_CONFIG)
    out, notes = make(folder)
    assert weights(out) == weights(expected)
    assert any("weights are stored in FP8 and were decoded" in note for note in notes)


def in_mxfp4(stack):
    """[E, in, out] -> (bytes [E, out, in / 32, 16], exponents [E, out, in / 32], the stack that they stand for)."""
    points = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    points = torch.cat([points, -points])
    groups = stack.mT.unflatten(-1, (-1, 32)).float()
    exponents = groups.abs().amax(-1).log2().floor() - 2
    codes = (groups.div(exponents.exp2()[..., None])[..., None] - points).abs().argmin(-1)
    pairs = codes[..., ::2] | codes[..., 1::2] << 4
    plain = points[codes] * exponents.exp2()[..., None]
    return pairs.byte(), (exponents + 127).byte(), plain.flatten(-2).mT.contiguous()


@pytest.mark.parametrize("recipe", ["higgs-4", "w4a8kv8"])
@pytest.mark.parametrize("entry", [None, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}])
def test_experts_in_mxfp4_are_quantized_as_their_decoded_weights_are(recipe, entry, tmp_path, tiny_tokenizer):
    """As gpt-oss is published: streamed without data, and calibrated."""
    folder = save_family(
        tmp_path / "model", "gpt_oss", tiny_tokenizer, hidden_size=64, intermediate_size=64, num_hidden_layers=1
    )
    stored, plain = {}, {}
    for name, tensor in Checkpoint.open(folder).items():
        if name.endswith("_proj") and ".experts." in name:
            stored[f"{name}_blocks"], stored[f"{name}_scales"], plain[name] = in_mxfp4(tensor)
        else:
            stored[name] = plain[name] = tensor
    wanted = apply_settings(preset(recipe), [*SMALL, "test=null", "search.method=none"])
    change_tensors(folder, lambda _: {n: t.bfloat16() for n, t in plain.items()})
    expected, _ = make(folder, recipe=wanted)
    change_tensors(folder, lambda _: {n: t.bfloat16() if t.is_floating_point() else t for n, t in stored.items()})
    change_config(folder, quantization_config=entry)
    out, notes = make(folder, recipe=wanted)
    assert weights(out) == weights(expected)
    assert "2 weights are stored in MXFP4 and were decoded" in notes
