"""Every family with a row goes through whole runs: calibrated, folded, cached, saved, read back, decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import paley
from family_configs import CONFIGS, MOE, plain_attention
from paley.arch import FAMILIES
from paley.data import blocks_from_ids
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.export.plain import dequantize
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.pipeline import quantize
from paley.recipe import Recipe, apply_settings, preset

IDS = torch.randint(4, 60, (2, 21), generator=torch.Generator().manual_seed(0))
SMALL = ("calibration.source=self", "calibration.sequences=4", "calibration.seq_len=24", "hadamard=16")


def save_family(folder: Path, kind: str, tokenizer: object, **settings: object) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[kind](num_key_value_heads=2, attn_implementation=plain_attention(kind), **settings)
    config.vocab_size = 260
    model = AutoModelForCausalLM.from_config(config)
    row = FAMILIES[kind]
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.2 + (1.0 - row.gain_offset if "norm" in name else 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def recipe(name: str, *settings: str) -> Recipe:
    return apply_settings(preset(name), [*SMALL, *settings])


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_eight_bits_everywhere_are_close_to_the_original(kind, tmp_path, tiny_tokenizer):
    """Weights by GPTQ, inputs, keys and values. That it reads back with a divergence of 0 is checked by the run."""
    model = save_family(tmp_path / "model", kind, tiny_tokenizer)
    made = quantize(model, recipe("w8a8kv8", "test=null"), output=tmp_path / "out")
    loaded = paley.load(made.output)
    original = AutoModelForCausalLM.from_pretrained(model, attn_implementation=plain_attention(kind))
    whole, wanted = loaded(IDS, use_cache=False).logits, original(IDS, use_cache=False).logits
    error = float((whole - wanted).square().mean() / wanted.square().mean())
    assert 0 < error < (0.2 if kind in MOE else 0.06)  # rounded tokens may reach other experts
    cache = PackedKVCache(loaded)
    pieces = [loaded(part, **cache_argument(loaded, cache)).logits for part in IDS.split([9, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=0.05 * float(wanted.std()))
    for name, layer in made.results.layers.items():
        assert layer.rel_error is not None
        assert layer.rel_error < 0.2  # of few tokens and the outputs they make
        assert (layer.experts is not None) == (".experts." in name)
        assert layer.experts is None or len(layer.experts) == 4


FOLDING = [kind for kind in CONFIGS if FAMILIES[kind].why_stream_is_fixed() is None]
QUICK = {("gemma", True), ("granite", False), ("phi3", False), ("gpt_oss", False), ("qwen3_moe", False)}


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(kind, tied, marks=() if (kind, tied) in QUICK else pytest.mark.long)
        for kind in FOLDING
        for tied in (True, False)
    ],
)
@torch.no_grad()
def test_folded_and_widened_models_decode_to_ordinary_ones(kind, tied, tmp_path, tiny_tokenizer):
    model = save_family(tmp_path / "model", kind, tiny_tokenizer, tie_word_embeddings=tied)
    wider = () if FAMILIES[kind].heads_follow else ("expand=12",)
    wanted = recipe("gbs-w8a16", "test=null", "search.method=none", *wider)
    out = quantize(model, wanted, output=tmp_path / "out").output
    original = AutoModelForCausalLM.from_pretrained(model)(IDS, use_cache=False).logits
    ours = paley.load(out)(IDS, use_cache=False).logits
    assert float((ours - original).square().mean() / original.square().mean()) < (0.2 if kind in MOE else 0.02)
    plain = dequantize(out, output=tmp_path / "plain", weights_only=True, dtype="float32").output
    decoded = AutoModelForCausalLM.from_pretrained(plain)(IDS, use_cache=False).logits
    torch.testing.assert_close(decoded, ours, rtol=0, atol=0.02 * float(original.std()))


@pytest.mark.parametrize("kind", ["granite", "gemma2", "phi3"])
@torch.no_grad()
def test_scores_see_caps_and_multipliers(kind, tmp_path, tiny_tokenizer):
    """A score's logits are those of the model, and the reference's the original's."""
    model = AutoModelForCausalLM.from_pretrained(
        save_family(tmp_path / "model", kind, tiny_tokenizer), attn_implementation=plain_attention(kind)
    )
    blocks = blocks_from_ids(IDS, "test", "some")
    reference = Reference.of(model, blocks)
    scored = evaluate(model, blocks, reference)
    logits = model(IDS, use_cache=False).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    assert scored.nll == pytest.approx(float(wanted), rel=1e-5)
    assert scored.reference_nll == pytest.approx(float(wanted), rel=1e-5)
    assert scored.kl is not None
    assert abs(scored.kl) < 1e-6
