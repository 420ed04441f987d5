"""W(1+1)A(1x4) through the whole pipeline, alone and together with everything that plans can hold."""

import random
from dataclasses import replace

import pytest
import torch

import paley
from paley import hf
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, WeightScheme
from paley.format.checkpoint import Checkpoint
from paley.model.coded import Coded
from paley.model.linear import QuantLinear
from paley.model.loading import open_source
from paley.pipeline import make_plan, quantize
from paley.pipeline.resolve import under_plan
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

GROUPS = ["weights.group_size=32", "inputs.group_size=32", "outliers=3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dogs", "sing", "when", "rain", "falls"]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=60)) for _ in range(60)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_tokenizer, hidden_size=64, intermediate_size=96)


def recipe(text, name, *settings):
    parts = ("calibration", "search", "test")
    sizes = [setting for part in parts for setting in (f"{part}.sequences=4", f"{part}.seq_len=32")]
    return apply_settings(preset(name), [f"calibration.source={text}", *sizes, *settings])


def test_what_the_presets_decide():
    weights, inputs = WeightScheme("free2", 128, "gptq", "em_diagonal"), ActivationScheme("uint4", group_size=128)
    cache = ActivationScheme("uint4", clip_ratio=0.95)
    w1a4, w1a16 = preset("w1a4"), preset("w1a16")
    assert (w1a4.weights, w1a4.inputs, w1a4.keys, w1a4.values) == (weights, inputs, cache, cache)
    assert (w1a16.weights, w1a16.inputs, w1a16.keys, w1a16.values) == (weights, None, None, None)
    for made in (w1a4, w1a16):
        assert (made.rotate, made.hadamard, made.expand, made.expand_mlp) == ("auto", 1024, 0, "auto")
        assert (made.outliers, made.center_keys, made.search.method) == (0, "mean", "none")


COMPOSED = {
    "alone": (),
    "no rotation": ("rotate=none", "center_keys=false"),
    "two scales": ("weights.grid=mirror2",),
    "refitted inputs": ("inputs.refit=true",),
    "expanded": ("expand=32", "outliers=0"),
    "expanded, outliers": ("expand=32",),
    "searched": ("search.method=gbs", "search.iterations=1"),
    "another layer's grid": ("overrides=[{pattern: '*.1.mlp.*', weight: {grid: int4, group_size: 32}}]",),
    "a layer kept": ("overrides=[{pattern: '*.0.self_attn.o_proj', keep: true}]",),
    "a budget": ("budget={weights: 4.5, source: self, sequences: 2, seq_len: 16, levels: 3}",),
    "outliers beside integers": ("weights={grid: uint3, group_size: 32}",),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_it_composes_with(name, model, text, tmp_path):
    """`quantize` itself refuses a checkpoint that does not read back to the model in memory."""
    outcome = quantize(model, recipe(text, "w1a4", *GROUPS, *COMPOSED[name]), output=tmp_path / "out")
    assert outcome.results.evaluation.kl < 0.8  # logits of zero: 1.6, uniform ones .9
    loaded = paley.load(tmp_path / "out")
    counted = {p for p, scheme in outcome.plan.linears.items() if scheme.weight is not None or name == "a budget"}
    state = loaded.state_dict().items()
    stored = sum(tensor.nbytes for key, tensor in state if key.rpartition(".")[0] in counted and ".bias" not in key)
    # What a budget keeps is loaded in 32 bits, and stored in 16.
    kept = sum(tensor.nbytes // 2 for key, tensor in state if key.removesuffix(".weight") in counted)
    weights = sum(Checkpoint.open(model).tensor(f"{path}.weight").numel() for path in counted)
    assert outcome.results.bits_per_quantized_weight == pytest.approx(8 * (stored - kept) / weights)
    dense = hf.load(tmp_path / "out", product="dense")
    for path, scheme in outcome.plan.linears.items():  # on equal inputs: in the next layer a code may flip
        if not isinstance(dense.get_submodule(path), QuantLinear):
            continue
        width = dense.get_submodule(path).in_features if scheme.transform is None else scheme.transform.in_dim
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        got, want = loaded.get_submodule(path)(x), dense.get_submodule(path)(x)
        # The integer product, which layers beside the planes take, rounds inputs to 8 bits.
        assert (got - want).norm() < 0.02 * want.norm()
    assert all(scheme.outliers == 0 for scheme in outcome.plan.linears.values() if scheme.weight is None)


def test_a_budget_chooses_among_free_grids(model, text):
    budget = "budget={weights: 4.5, source: self, sequences: 2, seq_len: 16, levels: 3}"
    plan = make_plan(model, recipe(text, "w1a4", *GROUPS, budget))
    blocks = [scheme for path, scheme in plan.linears.items() if ".layers." in path]
    chosen = {scheme.weight.grid for scheme in blocks if scheme.weight is not None}
    assert len(chosen) > 1
    assert all(grid.free for grid in chosen)


def test_without_data_it_is_streamed(model, text, tmp_path):
    settings = (
        "rotate=none",
        "weights.method=nearest",
        "weights.scale_search=em",
        "weights.group_size=16",
        "outliers=0",
    )
    wanted = recipe(text, "w1a16", *settings)
    outcome = quantize(model, wanted, output=tmp_path / "out")
    problem = under_plan(open_source(model), outcome.plan)
    assert problem.is_data_free
    loaded = paley.load(tmp_path / "out")
    plain = Checkpoint.open(model)
    for path, scheme in outcome.plan.linears.items():
        weight = plain.tensor(f"{path}.weight").float()
        stored = loaded.get_submodule(path).dequantize()
        error = (stored - weight).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(outcome.results.layers[path].rel_error, rel=1e-4)
        assert float(error) < 0.1
        assert scheme.outliers == 0
    with_outliers = {p: replace(s, outliers=int(".layers." in p)) for p, s in outcome.plan.linears.items()}
    assert not problem.with_schemes(replace(problem.schemes, linears=with_outliers)).is_data_free


def test_undone_it_is_an_ordinary_model_of_the_same_weights(model, text, tmp_path):
    from paley.export.plain import dequantize

    wanted = recipe(text, "w1a16", "rotate=none", "weights.group_size=32", "outliers=3")
    quantize(model, wanted, output=tmp_path / "out")
    dequantize(tmp_path / "out", output=tmp_path / "plain", dtype="float32")
    plain, loaded = Checkpoint.open(tmp_path / "plain"), paley.load(tmp_path / "out")
    for name, module in loaded.named_modules():
        if isinstance(module, Coded):
            assert torch.equal(plain.tensor(f"{name}.weight"), module.dequantize())


def test_a_plan_edited_to_need_text_is_refused_before_any_work(model, text, tmp_path):
    wanted = recipe(text, "rtn-w4a16")
    plan = make_plan(model, wanted)
    name = "model.layers.0.mlp.up_proj"
    edited = plan.linears | {name: replace(plan.linears[name], outliers=2)}
    with pytest.raises(PaleyError, match=f"{name} needs calibration text"):
        quantize(model, plan=plan.model_copy(update={"linears": edited}), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
