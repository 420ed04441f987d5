"""Every kind of bad input: exit code 2, a message that says what and what to do, and nothing written or lost."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from paley.cli import app


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "good"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(value):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value

    return lambda folder: edit_tensors(folder, change)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def shard_without_file(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 not looked at")


MODELS = {
    "unknown architecture": (lambda f: edit_config(f, model_type="gpt_neox"), r"gpt_neox.*not supported.*llama"),
    "missing shard": (shard_without_file, r"model-00002-of-00002\.safetensors"),
    "truncated shard": (truncate, r"model\.safetensors"),
    "corrupted shard": (corrupt, r"model\.safetensors"),
    "pickle": (pickled, r"(?s)pytorch_model\.bin.*safetensors"),
    "config disagrees": (lambda f: edit_config(f, intermediate_size=48), r"disagree|shape|size"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight"),
    "nan": (poison(float("nan")), r"model\.layers\.0\.mlp\.up_proj\.weight.*(?i:nan)"),
    "inf": (poison(float("inf")), r"model\.layers\.0\.mlp\.up_proj\.weight.*(?i:inf)"),
    "already quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantized already",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "unreachable width": (lambda f: None, r"(?s)hidden size 27.*expand"),
}


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def assert_refused(result, pattern, folder, before):
    code, output = result
    assert code == 2, output
    assert re.search(pattern, output), output
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(name, model, tmp_path):
    change, pattern = MODELS[name]
    change(model)
    extra = ["--expand", "3"] if name == "unreachable width" else []
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--preset", "w4a4kv4", "--output", tmp_path / "out", *extra)
    assert_refused(result, pattern, tmp_path, before)


SETTINGS = {
    "bits out of range": (["--preset", "w9a4"], r"W9 has no grid"),
    "one bit": (["--preset", "w1a16"], r"W1 has no grid"),
    "unknown preset": (["--preset", "quarto-w4a4kv4"], r"did you mean 'quarot'"),
    "unknown key": (["--preset", "w4a4kv4", "--set", "calibration.sequence=3"], r"did you mean '.*sequences'"),
    "wrong type": (["--preset", "w4a4kv4", "--set", "search.sequences=many"], r"search\.sequences"),
    "clip out of range": (["--preset", "w4a4kv4", "--set", "inputs.clip_ratio=-1"], r"clip_ratio"),
    "group that does not divide": (["--preset", "w4g7a16"], r"group_size=7"),
    "missing text": (["--preset", "w4a4kv4", "--calibration", "nowhere.txt"], r"nowhere\.txt"),
    "neither preset nor recipe": ([], r"--preset"),
    "no such device": (["--preset", "w4a4kv4", "--device", "tpu"], r"tpu"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings(name, model, tmp_path):
    flags, pattern = SETTINGS[name]
    code, output = run("quantize", model, "--output", tmp_path / "out", *flags)
    assert code == 2, output
    assert re.search(pattern, output), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "pattern"), [("", r"empty"), ("Too short.", r"(?i)token")])
def test_bad_text(content, pattern, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(content)
    code, output = run("quantize", model, "--preset", "w4a4kv4", "--calibration", text, "--output", tmp_path / "out")
    assert code == 2
    assert re.search(pattern, output), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("wieghts: null\n", r"did you mean '?weights"),
        ("seed: zero\n", r"seed"),
        ("[1, 2]\n", r"recipe\.yaml"),
        ("a: [", r"recipe\.yaml"),
    ],
)
def test_bad_recipes(content, pattern, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert_refused(result, pattern, tmp_path, before)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("quantize", "someone/some-model", "--preset", "w4a4kv4", "--output", tmp_path / "out")
    assert_refused(result, r"someone/some-model.*(network|reach)", tmp_path, [])


def test_no_such_folder(tmp_path):
    result = run("quantize", tmp_path / "nowhere", "--preset", "w4a4kv4", "--output", tmp_path / "out")
    assert_refused(result, r"no such folder", tmp_path, [])
