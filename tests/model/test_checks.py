"""What config.json may not say is refused in one line, before anything is made of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import paley
from paley import hf
from paley.core.errors import PaleyError
from paley.model.loading import open_source, read_config
from paley.pipeline import quantize
from tiny_models import change_config, higgs, save_tiny, unseal


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    return save_tiny(tmp_path / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("model")
    return quantize(save_tiny(root / "model", tiny_tokenizer), higgs(), output=root / "out").output


def refused(folder, match):
    with pytest.raises(PaleyError, match=match) as caught:
        open_source(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta", "hidden_size", "others")
            for value in (float("nan"), float("inf"), float("-inf"))
        ),
        ("rope_parameters", {"rope_theta": float("nan"), "rope_type": "default"}),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, float("nan")]}),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", 0),
        ("rope_theta", -1.0),
    ],
)  # fmt: skip
def test_numbers_that_are_none(folder, key, value):
    refused(change_config(folder, **{key: value}), f"config.json: {key}.*(put a number there|must be positive)")


@pytest.mark.parametrize("value", [-1, 0, 3.5, "64", True, [64], -(10**30)])
@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings"],
)  # fmt: skip
def test_sizes_that_are_none(folder, key, value):
    refused(change_config(folder, **{key: value}), f"config.json: {key} must be a positive whole number, got")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", {}), ("model_type", ["llama"]), ("model_type", 7), ("architectures", [{}]), ("architectures", 7)],
)
def test_names_that_are_no_text(folder, quantized, tmp_path, key, value):
    refused(change_config(folder, **{key: value}), "config.json: model_type and architectures are names, got")
    out = shutil.copytree(quantized, tmp_path / "out")
    change_config(out, **{key: value})
    with pytest.raises(PaleyError, match="model_type and architectures are names"):
        paley.load(out)


@pytest.mark.parametrize(
    ("family", "key", "value", "what"),
    [
        *(("mixtral", "num_experts_per_tok", n, "must be a positive whole number") for n in (0, -1, "2")),
        ("mixtral", "num_experts_per_tok", 9, "num_experts_per_tok is 9, but there are 4 experts"),
        *((kind, "sliding_window", n, "must be positive") for kind in ("mixtral", "mistral") for n in (0, -1)),
        ("gemma2", "query_pre_attn_scalar", -4, "must be positive"), ("gemma2", "query_pre_attn_scalar", 0, "positive"),
        ("gemma2", "final_logit_softcapping", 0.0, "null switches it off"),
        ("gemma2", "attn_logit_softcapping", -1.0, "null switches it off"),
        ("granite", "logits_scaling", 0, "must be positive"),
        ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor must be positi"),
        ("qwen2", "rope_scaling", {"type": "yarn", "factor": -2.0}, "factor must be positive"),
    ],
)  # fmt: skip
def test_settings_of_families_that_are_none(tmp_path, family, key, value, what):
    config = AutoConfig.for_model(family, num_hidden_layers=2, **({"num_local_experts": 4} if "mix" in family else {}))
    config.save_pretrained(tmp_path)
    change_config(tmp_path, **{key: value})
    with pytest.raises(PaleyError, match=f"config.json: .*{what}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("gpt2", "n_embd"), ("gpt2", "n_head"), ("gpt2", "n_layer"), ("mpt", "d_model"), ("mpt", "n_heads")],
)
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_by_older_names_that_are_none(tmp_path, kind, key, value):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(PaleyError, match=f"{key} must be a positive whole number, got {value}"):
        read_config(change_config(tmp_path, **{key: value}))


@pytest.mark.parametrize("value", [2**62, 10**30])
@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_sizes_that_no_machine_has(folder, key, value):
    refused(change_config(folder, **{key: value}), r"config\.json")


def test_a_text_config_that_is_none(folder):
    refused(change_config(folder, text_config=3), "text_config must be a mapping, got 3")


@pytest.mark.parametrize("layers", [3, 10**6, 10**18])
def test_more_layers_than_the_weights_have(folder, quantized, layers, tmp_path):
    refused(change_config(folder, num_hidden_layers=layers), f"num_hidden_layers is {layers:,}, but the weights have 2")
    hf.register()
    for old in (False, True):
        out = shutil.copytree(quantized, tmp_path / f"out{old}")
        change_config(unseal(out) if old else out, num_hidden_layers=layers)
        with pytest.raises(PaleyError, match="num_hidden_layers"):
            paley.load(out)
        if layers < 10**9:  # transformers itself makes a list of so many
            with pytest.raises(PaleyError, match="num_hidden_layers"):
                AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("architectures", [True, False])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("granite", {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
        ("granite", {"attention_multiplier": 0.015625}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("llama", {"query_pre_attn_scalar": 256}),
        ("olmo", {"clip_qkv": 8.0}),
        ("mixtral", {"num_local_experts": 8}),
        ("llama", {"scale_emb": 12, "scale_depth": 1.4}),
        ("llama", {"mup_attn_multiplier": 0.5}),
        ("llama", {"use_qk_norm": True}),
        ("mistral", {"sliding_window": 8}),
        ("cwm", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("llama", {"attention_chunk_size": 16}),
    ],
)
def test_a_family_in_anothers_name(folder, family, keys, architectures):
    """The tensors of many families are those of Llama; what they compute is not."""
    name = {"smollm3": "SmolLM3", "gemma2": "Gemma2"}.get(family, family.capitalize()) + "ForCausalLM"
    changes = {"architectures": [name]} if architectures else {"architectures": None} | keys
    if architectures and family == "llama":
        changes |= keys
    refused(change_config(folder, **changes), "another family's|has no use for")


@pytest.mark.parametrize("hint", ["lama", "smollm33", "gpt_neox", "llama5"])
def test_no_family_is_suggested_for_another(folder, hint):
    change_config(folder, model_type=hint)
    with pytest.raises(PaleyError) as caught:
        open_source(folder)
    assert "did you mean" not in str(caught.value)


def test_keys_that_change_nothing_are_passed_over(folder):
    change_config(
        folder, pretraining_tp=1, use_cache=False, no_rope_layers=[1, 1], residual_multiplier=1.0, is_llama_config=True,
        final_logit_softcapping=None, unsloth_version="2025.1", num_experts=0, use_qk_norm=False, max_window_layers=28,
    )  # fmt: skip
    assert open_source(folder).notes == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 2048},
        {"sliding_window": 8, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
    ],
)
def test_windows_that_leave_nothing_out_are_passed_over(folder, keys):
    assert open_source(change_config(folder, max_position_embeddings=2048, **keys)).notes == ()


def test_every_familys_own_keys_are_known(tmp_path):
    """Configurations as transformers makes them are refused for no key of theirs."""
    from paley.model.checks import check_config, check_family

    kinds = "llama granite smollm3 cohere gemma2 gemma3_text mixtral olmoe phi3 gpt_oss qwen3_moe falcon_h1 mamba2"
    for kind in (kinds + " deepseek_v3 glm4 lfm2 starcoder2 minicpm3").split():
        config = AutoConfig.for_model(kind)
        raw = json.loads(config.to_json_string(use_diff=False))
        check_config(tmp_path, raw)
        check_family(tmp_path, raw | {"model_type": kind}, config)


def test_tokens_without_an_embedding_are_named_at_the_start(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, vocab_size=100)
    (tmp_path / "text.txt").write_text("three bits are enough for anybody\n\n" * 400)
    recipe = higgs().model_copy(update={"test": paley.recipe.Test(source=str(tmp_path / "text.txt"), seq_len=16)})
    with pytest.raises(PaleyError, match=r"text.txt: the tokenizer made token .* vocabulary has 100 tokens"):
        quantize(folder, recipe, output=tmp_path / "out")
    out = quantize(folder, higgs(), output=tmp_path / "out").output
    with pytest.raises(PaleyError, match=r"prompt: the tokenizer made token .* vocabulary has 100 tokens"):
        paley.generate(out, "hello you")
    with pytest.raises(PaleyError, match=r"text.txt: the tokenizer made token"):
        paley.measure_sensitivity(folder, source=str(tmp_path / "text.txt"), seq_len=16, sequences=2)
    with pytest.raises(PaleyError, match=r"text.txt: the tokenizer made token"):
        paley.score(out, data=str(tmp_path / "text.txt"), seq_len=16)
    assert paley.load(out)(torch.tensor([[1, 2]])).logits.shape[-1] == 100
