"""What the vLLM plugin makes of a folder, without vLLM: fused layers in parts, filled as vLLM's loaders fill them."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import paley
import paley.vllm_plugin
from paley.core.errors import PaleyError
from paley.core.schemes import LinearScheme
from paley.core.transforms import Transform
from paley.format.checkpoint import Checkpoint
from paley.format.spec import quantization_of
from paley.recipe import apply_settings, preset
from paley.vllm_plugin.parts import Parts
from paley.vllm_plugin.support import check_servable
from tiny_models import save_tiny

QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
ROWS, WIDTH = [48, 24, 24], 48
SHARDS = {"q": QKV[0], "k": QKV[1], "v": QKV[2]}
SETTINGS = ["test=null", "hadamard=16", "keys=null", "values=null"]
MIXED = 'overrides=[{pattern: "*.k_proj", weight: {grid: p1n64}}, {pattern: "*.v_proj", keep: true}]'


def folder_of(tmp_path: Path, tokenizer, name: str, *settings: str, **model: bool) -> Path:
    source = save_tiny(tmp_path / "model", tokenizer, **model)
    recipe = apply_settings(preset(name), [*SETTINGS, *settings])
    return paley.quantize(source, recipe, output=tmp_path / "out").output


@pytest.fixture(params=[(), (MIXED,), ("weights.grid=trellis3",)], ids=["alike", "mixed", "trellis"])
def folder(request, tmp_path, tiny_tokenizer) -> Path:
    return folder_of(tmp_path, tiny_tokenizer, "higgs-4", *request.param)


def parts_of(stored: Checkpoint, dtype: torch.dtype = torch.float32) -> Parts:
    linears = quantization_of(stored).linears
    return Parts(QKV, [linears.get(name, LinearScheme()) for name in QKV], ROWS, WIDTH, dtype)


def fill(parts: Parts, stored: Checkpoint, without: str = "") -> None:
    """As vLLM does: `.q_proj` becomes `.qkv_proj` and a shard, and the parameter's own loader gets both."""
    for shard, name in SHARDS.items():
        for full in stored.names:
            if full.startswith(f"{name}.") and full != without:
                tensor = parts.tensors[full.removeprefix(f"{name}.")]
                tensor.weight_loader(tensor, stored.tensor(full), shard)


@pytest.mark.parametrize("product", ["packed", "dense", "auto"])
def test_a_fused_layer_multiplies_as_its_parts(folder, product):
    stored = Checkpoint.open(folder)
    parts = parts_of(stored)
    fill(parts, stored)
    parts.finish_(product)
    model = paley.load(folder, product="packed" if product == "packed" else "dense")
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    want = torch.cat([model.get_submodule(name)(x) for name in QKV], -1)
    tolerance = 0.03 if product == "auto" else 1e-6  # integers round inputs
    assert (parts(x) - want).norm() <= tolerance * want.norm()


def test_codes_leave_memory_where_the_product_has_its_own(folder):
    stored = Checkpoint.open(folder)
    parts = parts_of(stored)
    fill(parts, stored)
    parts.finish_("dense")
    assert parts.tensors == {}
    assert [linear.codes for linear in parts.linears] == [None] * 3


def test_a_traced_layer_is_one_operation(folder):
    stored = Checkpoint.open(folder)
    parts = parts_of(stored)
    fill(parts, stored)
    parts.finish_("dense")
    x = torch.randn(7, WIDTH)
    traced = torch.compile(lambda x: parts(x) + 1, fullgraph=True, backend="eager")
    assert torch.equal(traced(x), parts(x) + 1)


def test_an_embedding_is_looked_up_and_its_codes_stay(tmp_path, tiny_tokenizer):
    folder = folder_of(tmp_path, tiny_tokenizer, "higgs-4", qwen=True)
    stored, name = Checkpoint.open(folder), "model.embed_tokens"
    parts = Parts([name], [quantization_of(stored).linears[name]], [len(tiny_tokenizer)], WIDTH, torch.float32)
    for end, tensor in parts.tensors.items():
        tensor.weight_loader(tensor, stored.tensor(f"{name}.{end}"))
    parts.finish_("dense", looked_up=True)
    model = paley.load(folder, product="dense")
    ids = torch.tensor([[1, 5], [259, 0]])
    assert torch.equal(parts.look_up(ids), model.get_input_embeddings()(ids))
    x = torch.randn(3, WIDTH)
    assert torch.equal(parts(x), model.get_output_embeddings()(x))  # of the tied head
    traced = torch.compile(lambda ids: parts.look_up(ids), fullgraph=True, backend="eager")
    assert torch.equal(traced(ids), parts.look_up(ids))


def test_two_models_have_layers_of_one_name(folder):
    stored = Checkpoint.open(folder)
    first, second = parts_of(stored), parts_of(stored)
    assert first.key == QKV[0]
    assert second.key == f"{QKV[0]} 2"


def test_what_is_missing_or_wrong_is_named(folder):
    stored = Checkpoint.open(folder)
    parts = parts_of(stored)
    fill(parts, stored, without=f"{QKV[0]}.scales")
    with pytest.raises(PaleyError, match=r"q_proj.scales: is missing from the files"):
        parts.finish_("dense")
    codes = parts.tensors["codes"]
    with pytest.raises(PaleyError, match=r"q_proj.codes: must be torch.uint8 .*, got torch.uint8 \(3, 2\)"):
        codes.weight_loader(codes, torch.zeros(3, 2, dtype=torch.uint8), "q")
    with pytest.raises(PaleyError, match=r"q_proj.codes: must be torch.uint8 .*, got torch.float32"):
        codes.weight_loader(codes, stored.tensor(f"{QKV[0]}.codes").float(), "q")
    with pytest.raises(PaleyError, match="its files hold codes of part 'x', which has none"):
        codes.weight_loader(codes, torch.zeros(3, 2), "x")


def test_damaged_numbers_are_refused(folder):
    stored = Checkpoint.open(folder)
    parts = parts_of(stored)
    fill(parts, stored)
    parts.tensors["scales"].data[3] = float("nan")
    with pytest.raises(PaleyError, match=r"q_proj.scales: .*damaged"):
        parts.finish_("dense")


def test_a_transform_of_another_width_is_refused():
    scheme = LinearScheme(transform=Transform(in_dim=32, out_dim=32, order=32, seed=0))
    with pytest.raises(PaleyError, match=r"q_proj: transform.in_dim=32, but the layer reads 48"):
        Parts(QKV[:1], [scheme], [48], WIDTH, torch.float32)


@pytest.mark.parametrize(
    ("family", "change", "complaint"),
    [
        ("gpt2", {}, "nothing is known of the layers of 'gpt2' models"),
        ("qwen3_moe", {}, "has no stacks of experts"),
        ("llama", {"stream": Transform(in_dim=48, out_dim=48, order=16, seed=0)}, "turns .*; quantize it with rotate"),
    ],
)
def test_what_vllm_cannot_hold_is_refused(family, change, complaint, tmp_path, tiny_tokenizer):
    spec = quantization_of(Checkpoint.open(folder_of(tmp_path, tiny_tokenizer, "higgs-4")))
    assert check_servable(spec, "llama").head == "lm_head"
    with pytest.raises(PaleyError, match=complaint):
        check_servable(spec.model_copy(update=change), family)


def test_quantized_caches_are_refused(tmp_path, tiny_tokenizer):
    spec = quantization_of(Checkpoint.open(folder_of(tmp_path, tiny_tokenizer, "higgs-4", "keys={grid: int4}")))
    with pytest.raises(PaleyError, match=r"layers.0.self_attn quantizes keys or values.*keys=null values=null"):
        check_servable(spec, "llama")
    name, scheme = next(iter(spec.attentions.items()))
    spec = spec.model_copy(update={"attentions": {name: replace(scheme, keys=None)}})
    check_servable(spec, "llama")


def test_vllm_finds_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["paley"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_a_vllm_without_the_classes_still_serves_all_else(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "paley.vllm_plugin.quantization", None)
    paley.vllm_plugin.register()
    assert "Paley folders are not served" in caplog.text


def test_the_parts_of_a_layer_are_modules_of_their_own(folder):
    """So vLLM, which walks its own modules, meets the flat parameters alone."""
    assert not isinstance(parts_of(Checkpoint.open(folder)), nn.Module)
