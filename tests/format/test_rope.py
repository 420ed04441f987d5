"""Rotary settings survive in either spelling: in `rope_parameters`, and under the older keys alone."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

import paley
from paley.core.errors import PaleyError
from paley.format.rope import with_older_keys
from paley.model.loading import open_source, read_config
from paley.pipeline import quantize
from tiny_models import change_config, higgs, save_tiny

KINDS = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 512, "factor": 4.0,
    },
    "partial": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def settings(config):
    return {k: v for k, v in config.rope_parameters.items() if k != "type"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "glm4"])
def test_older_keys_alone_say_the_same(tmp_path, family, kind):
    if family == "phi3" and kind not in ("default", "longrope", "partial"):
        pytest.skip("Phi-3 has no other kinds")
    config = AutoConfig.for_model(family, **SIZES, rope_parameters=dict(KINDS[kind]))
    written = with_older_keys(config.to_dict())
    assert written["rope_theta"] == KINDS[kind]["rope_theta"]
    for keys in (ROTARY[:1], ROTARY[1:], ROTARY):
        kept = {k: v for k, v in written.items() if k in keys or k not in ROTARY}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        assert settings(read_config(tmp_path)) == settings(config), keys


def test_gemma_has_a_base_for_each_kind_of_layer(tmp_path):
    config = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=12, num_hidden_layers=2)
    config.rope_parameters["full_attention"] |= {"rope_theta": 2e6}
    config.rope_parameters["sliding_attention"] |= {"rope_theta": 3e4}
    written = with_older_keys(config.to_dict())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (2e6, 3e4)
    for keys in (ROTARY[:1], ROTARY[1:], ROTARY):
        kept = {k: v for k, v in written.items() if k in keys or k not in ROTARY}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        assert read_config(tmp_path).rope_parameters == config.rope_parameters, keys


OWN = {
    "gpt_neox": {"rotary_emb_base": 2e6, "rotary_pct": 0.5},
    "gpt_neox_japanese": {"rotary_emb_base": 2e6, "rotary_pct": 0.5},
    "modernbert-decoder": {"global_rope_theta": 2e6, "local_rope_theta": 3e4},
}  # fmt: skip


@pytest.mark.parametrize("family", OWN)
def test_older_keys_of_a_familys_own_are_read_and_written(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **OWN[family]}))
    config = read_config(tmp_path)
    written = with_older_keys(config.to_dict())
    assert written.items() >= OWN[family].items()
    kept = {k: v for k, v in written.items() if k in OWN[family] or k not in ROTARY}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert read_config(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("gemma", [False, True])
def test_both_are_in_what_is_quantized_and_in_what_is_decoded_again(tmp_path, tiny_tokenizer, gemma):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, gemma=gemma)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    changed = {"rope_theta": 3e5, "rope_parameters": None}
    if gemma:
        rope["full_attention"]["rope_theta"] = 3e5
        changed = {"rope_parameters": rope}
    change_config(folder, **changed)
    wanted = open_source(folder).config.rope_parameters
    out = quantize(folder, higgs(), output=tmp_path / "out").output
    paley.dequantize(out, output=tmp_path / "plain")
    for made in (out, tmp_path / "plain"):
        config = json.loads((made / "config.json").read_text())
        assert config["rope_theta"] == 3e5
        assert config["rope_parameters"] == wanted
    assert paley.load(out).config.rope_parameters == wanted


def test_two_bases_are_refused(tmp_path, tiny_tokenizer):
    folder = change_config(save_tiny(tmp_path / "model", tiny_tokenizer), rope_theta=5e5)
    with pytest.raises(PaleyError, match=r"rope_theta is 500000.0, but 10000.0 in rope_parameters"):
        open_source(folder)
