"""What keys have in common travels with a model: measured or a bias, saved, loaded by transformers, resumed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import paley
from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.pipeline import quantize
from paley.recipe import Recipe, apply_settings, preset
from tiny_models import higgs, save_tiny

KINDS = {"llama": {}, "qwen": {"qwen": True}, "gemma": {"gemma": True}}
IDS = torch.randint(4, 40, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "cat", "sat", "on", "mats", "and", "saw", "that", "dogs", "sing"]
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=60)) for _ in range(60)))
    return file


def cache_alone(text: Path, *settings: str) -> Recipe:
    sizes = "calibration.sequences=6", "calibration.seq_len=24", "test=null"
    return apply_settings(preset("w16a16k4v3"), [f"calibration.source={text}", *sizes, *settings])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_alone_leaves_the_weights_and_works_however_it_is_loaded(kind, tmp_path, tiny_tokenizer, text):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, dtype=torch.bfloat16, gains=True, **KINDS[kind])
    out = quantize(model, cache_alone(text), output=tmp_path / "out").output
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    offsets = {name for name in after if name.endswith("key_offset")}
    assert set(after) == {*before, *offsets}
    assert len(offsets) == 2
    for name in before:  # balanced rows change by powers of two, gains and all else not at all
        ratio = after.tensor(name).double() / before.tensor(name).double()
        balanced = any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm"))
        assert balanced or torch.equal(after.tensor(name), before.tensor(name)), name
        if balanced and kind != "gemma":
            assert torch.equal(ratio.log2(), ratio.log2().round()), name
    paley.register()
    ours = paley.load(out, dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    long = ours(IDS, use_cache=False).logits
    for loaded in (ours, theirs):
        cache = PackedKVCache(loaded)
        pieces = [loaded(part, **cache_argument(loaded, cache)).logits for part in IDS.split(6, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), long, rtol=0, atol=1e-8)
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)(IDS, use_cache=False).logits
    assert 1e-4 < float((long - exact).norm() / exact.norm()) < 0.5


def test_a_stopped_run_settles_keys_the_same_way(tmp_path, tiny_tokenizer, text, monkeypatch):
    model, recipe = save_tiny(tmp_path / "model", tiny_tokenizer), cache_alone(text)
    wanted = quantize(model, recipe, output=tmp_path / "whole").output
    with monkeypatch.context() as patch:
        patch.setattr("paley.pipeline.run.save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(model, recipe, output=tmp_path / "out")
    assert (tmp_path / "out.run" / "final").is_dir()
    monkeypatch.setattr("paley.model.key_statistics._Sums", None)  # what was measured is not measured again
    got = quantize(model, recipe, output=tmp_path / "out", resume=True).output
    assert load_file(got / "model.safetensors").keys() == load_file(wanted / "model.safetensors").keys()
    assert (got / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_text_a_bias_is_taken_off_where_there_is_one(kind, tmp_path, tiny_tokenizer):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, **KINDS[kind])
    out = quantize(model, higgs(name="higgs-w8a16k4v4"), output=tmp_path / "out").output
    section = Checkpoint.open(out).config["quantization_config"]["attentions"].values()
    assert {slot["center_keys"] for slot in section} == {"bias" if kind == "qwen" else False}
    assert not any(name.endswith("key_offset") for name in Checkpoint.open(out))
    loaded = paley.load(out, dtype=torch.float64)
    long = loaded(IDS, use_cache=False).logits
    cache = PackedKVCache(loaded)
    pieces = [loaded(part, **cache_argument(loaded, cache)).logits for part in IDS.split(6, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), long, rtol=0, atol=1e-8)


def test_where_rope_follows_the_length_keys_lose_the_mean_behind_it(tmp_path, tiny_tokenizer, text):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = save_tiny(tmp_path / "model", tiny_tokenizer, rope_parameters=rope)
    out = quantize(model, cache_alone(text), output=tmp_path / "out").output
    names = [name.rpartition(".")[2] for name in Checkpoint.open(out) if "key_" in name]
    assert names == ["key_mean", "key_mean"]


def test_balancing_without_a_mean_is_refused_in_a_plan_and_idle_in_a_recipe(text):
    recipe = cache_alone(text, "center_keys=false")
    assert not recipe.attention_scheme("x").balance_keys
    with pytest.raises(PaleyError, match="balance_keys is measured with center_keys 'mean'"):
        paley.core.schemes.AttentionScheme(recipe.keys, balance_keys=True)
