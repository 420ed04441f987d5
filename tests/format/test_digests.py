"""digests.json: whatever is changed of a folder is noticed, by name, when it is loaded or when it is verified."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import paley
from paley import hf
from paley.core.errors import PaleyError
from paley.format.checkpoint import read_tensors
from paley.format.digests import Digests, seal, seal_model
from paley.format.writer import ShardWriter
from paley.pipeline import quantize
from tiny_models import change_config, change_tensors, higgs, save_tiny, unseal

IDS = torch.tensor([[7, 19, 250, 33, 8]])
UP, ATTENTION = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("model")
    settings = ["inputs={grid: int8}", "keys={grid: int4}", "values={grid: int4}"]
    return quantize(save_tiny(root / "model", tiny_tokenizer), higgs(*settings), output=root / "out").output


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def loads(folder):
    hf.register()
    return [lambda: paley.load(folder), lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)]


def refused(folder: Path, match: str, *, load: bool = True) -> None:
    for check in [lambda: paley.verify(folder), *(loads(folder) if load else [])]:
        with pytest.raises(PaleyError, match=match) as caught:
            check()
        assert "\n" not in str(caught.value)


def test_a_folder_as_it_was_written_is_sound(out):
    found = paley.verify(out)
    assert (found.edited, found.not_covered) == ((), ())
    assert found.files == len(list(out.iterdir())) - 1
    assert found.bytes == sum(f.stat().st_size for f in out.iterdir()) - (out / "digests.json").stat().st_size
    for load in loads(out):
        load()


CHANGES = {
    "a code": (lambda t: t | {f"{UP}.codes": t[f"{UP}.codes"] ^ 1}, f"{UP}.codes"),
    "a scale": (lambda t: t | {f"{UP}.scales": t[f"{UP}.scales"] * 2}, f"{UP}.scales"),
    "a norm": (lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 1.001}, "model.norm.weight"),
    "a type": (lambda t: t | {"model.norm.weight": t["model.norm.weight"].float()}, "model.norm.weight"),
    "two layers": (
        lambda t: t | {f"{UP}.codes": t[f"{UP[:13]}0{UP[14:]}.codes"], f"{UP[:13]}0{UP[14:]}.codes": t[f"{UP}.codes"]},
        "up_proj.codes and 1 more are not as written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_tensor_is_named(out, what):
    change, name = CHANGES[what]
    change_tensors(out, change)
    refused(out, f"model.safetensors: .*{name}")


def test_the_same_tensors_in_other_files_are_loaded_but_not_verified(out):
    """Load goes by tensors: shards may be cut anew. The files are others, and that is what verify is for."""
    tensors = read_tensors(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    with ShardWriter(out, max_shard_bytes=20_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for load in loads(out):
        load()
    refused(out, "model.safetensors: ", load=False)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rope_theta": 1e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_parameters"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"head_dim": 6, "num_attention_heads": 8}, "head_dim"),
        ({"model_type": "mistral", "architectures": None}, "architectures"),
        ({"added": 1}, "added"),
        ({"attention_dropout": None}, "attention_dropout"),
    ],
)
def test_a_changed_key_of_the_config_is_named(out, changes, name):
    refused(change_config(out, **changes), f"config.json: {name} .*not as written")


@pytest.mark.parametrize(
    ("where", "change"),
    [
        (f"linears.{UP}", lambda s: s["linears"][UP].update(transform=None)),
        (f"linears.{UP}", lambda s: s["linears"][UP]["weight"].update(group_size=8)),
        (f"linears.{UP}", lambda s: s["linears"][UP]["input"].update(clip_ratio=0.5)),
        ("linears", lambda s: s["linears"].pop(UP)),
        (f"attentions.{ATTENTION}", lambda s: s["attentions"][ATTENTION].update(keys=None)),
        ("attentions", lambda s: s.update(attentions={})),
        ("format_version", lambda s: s.update(format_version=2)),
    ],
)  # fmt: skip
def test_a_changed_scheme_is_named(out, where, change):
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    change(section)
    refused(change_config(out, quantization_config=section), f"config.json: quantization_config.{where}")


def test_settings_of_generation_may_be_edited(out):
    change_config(out, eos_token_id=[2, 5], pad_token_id=0, use_cache=False, transformers_version="9.0")
    for load in loads(out):
        load()
    with pytest.raises(PaleyError, match=r"config\.json: "):
        paley.verify(out)


def test_a_chat_template_or_a_card_breaks_nothing(out):
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "images").mkdir()
    (out / "images" / "plot.png").write_bytes(b"\x89PNG")
    (out / "README.md").write_text("my own words")
    found = paley.verify(out)
    assert found.edited == ("README.md",)
    assert found.not_covered == ("chat_template.jinja", "images/plot.png")
    for load in loads(out):
        load()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "plan.json", "results.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_other_files_are_verified_alone(out, name, gone):
    if gone:
        (out / name).unlink()
    else:
        (out / name).write_text((out / name).read_text() + "\n")
    refused(out, f"{name}: {'is missing' if gone else 'has .* bytes, was written with'}", load=False)
    paley.load(out)


def test_all_damaged_files_are_counted(out):
    for name in ("tokenizer.json", "plan.json"):
        (out / name).unlink()
    refused(out, r"plan.json: is missing \(and 1 more: tokenizer.json\)", load=False)


def test_digests_of_another_folder(out, tmp_path, tiny_tokenizer):
    other = quantize(save_tiny(tmp_path / "model", tiny_tokenizer), higgs("seed=1"), output=tmp_path / "other").output
    shutil.copyfile(other / "digests.json", out / "digests.json")
    for load in loads(out):
        with pytest.raises(PaleyError, match=r"digests.json: does not belong to this config.json"):
            load()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not valid JSON"), ("{}", "is damaged at 'tensors'"), ("[]", "expected a mapping"),
        ('{"tensors": {"a": -1}, "config": {}}', "is damaged at 'tensors.a'"),
        ('{"tensors": {}, "config": {}, "files": {"../x": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}', "is damaged"),
        ('{"tensors": {}, "config": {}, "files": {"/x": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}', "is damaged"),
        ('{"tensors": {}, "config": {}, "files": {"x": {"bytes": 1, "sha256": "0"}}}', "is damaged"),
        ('{"version": 2, "tensors": {}, "config": {}}', "is damaged at 'version'"),
    ],
)  # fmt: skip
def test_digests_that_are_none(out, text, match):
    (out / "digests.json").write_text(text)
    refused(out, f"digests.json: {match}")


def test_digests_that_are_missing_are_missed(out):
    (out / "digests.json").unlink()
    refused(out, "digests.json: is missing")


def test_an_older_folder_is_loaded_and_said_to_be_unchecked(out, caplog):
    expected = paley.load(out)(IDS).logits
    unseal(out)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(paley.load(out)(IDS).logits, expected)
    assert "has no digests" in caplog.text
    with pytest.raises(PaleyError, match=r"digests.json: is missing"):
        paley.verify(out)


def test_a_model_saved_again_has_none(out, tmp_path, caplog):
    paley.load(out, product="dense").save_pretrained(tmp_path / "again")
    assert "digest" not in json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    with caplog.at_level(logging.WARNING):
        paley.load(tmp_path / "again")
    assert "has no digests" in caplog.text


def test_an_edited_folder_can_be_sealed_anew(out):
    """What `quantize` does at its end does not depend on who made the files."""
    change_config(out, rms_norm_eps=1e-2)
    (out / "digests.json").unlink()
    seal_model(out)
    seal(out)
    assert paley.verify(out).edited == ()
    paley.load(out)


def test_checksums_cover_name_type_shape_and_bytes(out):
    first = Digests.load(out).tensors
    assert len(set(first.values())) == len(first)
    zeros = change_tensors(out, lambda _: {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(2, 2)})
    seal_model(zeros)
    assert len(set(Digests.load(zeros).tensors.values())) == 3


@pytest.mark.parametrize("change", [{"pad_token_id": 10**30}, {"pad_token_id": "x"}, {"eos_token_id": {}}])
def test_what_transformers_cannot_take_is_one_line(out, change):
    change_config(out, **change)
    with pytest.raises(PaleyError, match="transformers cannot load this model") as caught:
        paley.load(out)
    assert "\n" not in str(caught.value)
