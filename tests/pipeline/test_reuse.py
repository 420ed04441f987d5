"""`paley quantize --from OUT`: weights whose scheme is the same keep their bytes, and what is exact is exact."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import paley
from command_line import paley_
from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.format.digests import seal
from paley.pipeline import quantize
from paley.pipeline.monitor import Monitor
from paley.recipe import apply_settings, preset
from tiny_models import change_config, change_tensors, higgs, save_tiny, unseal

DOWN = 'overrides=[{pattern: "*.1.mlp.down_proj", weight: {grid: int8, method: METHOD, scale_search: mse}}]'
ONE = ".1.mlp.down_proj."


class Notes(Monitor):
    def __init__(self):
        self.notes: list[str] = []
        self.stages: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng, file = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "i", "ot", "u")]
    file.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=120)) for _ in range(60)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "model", tiny_tokenizer, intermediate_size=64)


@pytest.fixture(scope="module")
def nearest(model, tmp_path_factory) -> Path:
    return quantize(model, higgs(), output=tmp_path_factory.mktemp("nearest") / "old").output


@pytest.fixture(scope="module")
def gptq(model, text, tmp_path_factory) -> Path:
    return quantize(model, recipe(text), output=tmp_path_factory.mktemp("gptq") / "old").output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder).items())


def changed(one: Path, other: Path) -> set[str]:
    """Names of tensors that differ, or that only one has."""
    first, second = tensors(one), tensors(other)
    both = {name for name in first.keys() & second.keys() if torch.equal(first[name], second[name])}
    return (first.keys() | second.keys()) - both


def recipe(text: Path, *settings: str, name: str = "w4a16"):
    sizes = [f"calibration.{size}" for size in ("sequences=8", "seq_len=32")]
    base = [f"calibration.source={text}", "search.method=none", "hadamard=16", "test=null", *sizes]
    return apply_settings(preset(name), [*base, *settings])


class TestWithoutData:
    def test_the_folder_is_that_of_a_whole_run(self, model, tmp_path):
        old = quantize(model, higgs("rotate=online"), output=tmp_path / "old").output
        new = higgs("rotate=online", DOWN.replace("METHOD", "nearest"))
        notes = Notes()
        made = quantize(model, new, base=old, output=tmp_path / "new", monitor=notes)
        whole = quantize(model, new, output=tmp_path / "whole")
        for file in ("model.safetensors", "config.json"):
            assert (made.output / file).read_bytes() == (whole.output / file).read_bytes(), file
        assert changed(old, made.output)
        assert all(ONE in name for name in changed(old, made.output))
        assert made.results.layers == whole.results.layers
        assert made.results.kept is not None
        assert (made.results.kept.weights, made.results.kept.fitted) == (13 + 1 + 1, 0)
        assert any(note.startswith("kept 15 of 16 weights of ") for note in notes.notes)

    def test_only_what_changed_is_quantized(self, model, tmp_path, monkeypatch):
        old = quantize(model, higgs(), output=tmp_path / "old").output
        from paley.pipeline import streaming

        made, one = [], streaming.quantize_tensor
        monkeypatch.setattr(streaming, "quantize_tensor", lambda job: made.append(job.name) or one(job))
        new = higgs(DOWN.replace("METHOD", "nearest"))
        quantize(model, new, base=old, output=tmp_path / "new")
        assert made == ["model.layers.1.mlp.down_proj"]

    def test_rounding_of_inputs_leaves_codes(self, model, tmp_path):
        old = quantize(model, higgs(), output=tmp_path / "old").output
        made = quantize(model, higgs("inputs={grid: int8}"), base=old, output=tmp_path / "new")
        assert not changed(old, made.output)
        assert made.results.kept.weights == 16

    def test_a_tied_pair(self, tiny_tokenizer, tmp_path):
        model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
        old = quantize(model, higgs(), output=tmp_path / "old").output
        made = quantize(model, higgs("embedding=null", "head=null"), base=old, output=tmp_path / "new")
        assert {name.rpartition(".")[0] for name in changed(old, made.output)} == {"model.embed_tokens"}


class TestCalibrated:
    @pytest.mark.parametrize("settings", [(), ("inputs={grid: int4}", "diagonal=true", "keys={grid: int4}",
                                               "center_keys=mean", "balance_keys=true")])  # fmt: skip
    def test_exact_is_exact(self, settings, model, text, tmp_path):
        """With a change in block 1 all before it is kept; a run from the beginning makes the very same folder."""
        old = quantize(model, recipe(text, *settings), output=tmp_path / "old").output
        new = recipe(text, *settings, DOWN.replace("METHOD", "gptq"))
        made = quantize(model, new, base=old, exact=True, output=tmp_path / "new")
        whole = quantize(model, new, output=tmp_path / "whole")
        assert not changed(made.output, whole.output)
        assert made.results.kept.weights == 1 + 7 + 1  # embedding and head are rounded by themselves
        assert made.results.kept.fitted == 0
        assert made.results.layers == whole.results.layers

    def test_all_that_is_alike_keeps_its_bytes(self, gptq, model, text, tmp_path):
        new = recipe(text, 'overrides=[{pattern: "*.0.self_attn.k_proj", weight: {grid: int8, method: gptq}}]')
        notes = Notes()
        made = quantize(model, new, base=gptq, output=tmp_path / "new", monitor=notes)
        assert {name.rpartition(".")[0] for name in changed(gptq, made.output)} == {"model.layers.0.self_attn.k_proj"}
        assert (made.results.kept.weights, made.results.kept.fitted) == (15, 13)  # but embedding and head
        assert any("13 of them were fitted to what earlier layers lost there" in note for note in notes.notes)
        whole = quantize(model, new, output=tmp_path / "whole")
        assert any("layers.1." in name for name in changed(whole.output, made.output))
        alone = "model.layers.0.self_attn.k_proj.codes"  # its input is the same in both
        assert torch.equal(tensors(whole.output)[alone], tensors(made.output)[alone])

    def test_what_was_fitted_once_is_never_exact_later(self, gptq, model, text, tmp_path):
        new = recipe(text, 'overrides=[{pattern: "*.0.self_attn.k_proj", weight: {grid: int8, method: gptq}}]')
        middle = quantize(model, new, base=gptq, output=tmp_path / "middle").output
        made = quantize(model, new, base=middle, exact=True, output=tmp_path / "new")
        assert (made.results.kept.weights, made.results.kept.fitted) == (2, 0)
        whole = quantize(model, new, output=tmp_path / "whole")
        assert not changed(made.output, whole.output)

    def test_nothing_changed(self, gptq, model, text, tmp_path):
        made = quantize(model, base=gptq, output=tmp_path / "new")
        assert not changed(gptq, made.output)
        assert (made.results.kept.weights, made.results.kept.fitted) == (16, 0)

    def test_another_text_keeps_codes_but_is_not_exact(self, gptq, model, text, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(text.read_text()[::-1].replace(">|txetfodne|<", "<|endoftext|>"))
        new = recipe(other, DOWN.replace("METHOD", "gptq"))
        made = quantize(model, new, base=gptq, output=tmp_path / "new")
        assert {name.rpartition(".")[0] for name in changed(gptq, made.output)} == {f"model.layers{ONE[:-1]}"}
        assert made.results.kept.fitted == made.results.kept.weights - 2 == 13  # embedding and head need no text
        with pytest.raises(PaleyError, match=r"none of its 16 .* behind a layer or a text that changed"):
            quantize(model, recipe(other, "embedding=null", "head=null"), base=gptq, exact=True, output=tmp_path / "no")
        assert not (tmp_path / "no").exists()

    def test_layers_that_share_a_diagonal_change_together(self, model, text, tmp_path):
        settings = ("inputs={grid: int4}", "diagonal=true")
        old = quantize(model, recipe(text, *settings), output=tmp_path / "old").output
        new = recipe(text, *settings, 'overrides=[{pattern: "*.0.mlp.up_proj", keep: true}]')
        made = quantize(model, new, base=old, output=tmp_path / "new")
        names = {name.rpartition(".")[0] for name in changed(old, made.output)}
        assert names == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"}

    def test_a_killed_run_goes_on(self, gptq, model, text, tmp_path, monkeypatch):
        from paley.pipeline import run as module

        new, save = recipe(text, DOWN.replace("METHOD", "gptq")), module.save_checkpoint
        monkeypatch.setattr(module, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(model, new, base=gptq, output=tmp_path / "new")
        monkeypatch.setattr(module, "save_checkpoint", save)
        with pytest.raises(PaleyError, match="of another model or other settings"):
            quantize(model, new, output=tmp_path / "new", resume=True)
        made = quantize(model, new, base=gptq, output=tmp_path / "new", resume=True)
        whole = quantize(model, new, base=gptq, output=tmp_path / "whole")
        assert not changed(made.output, whole.output)
        assert made.results == whole.results


class TestRefused:
    def test_a_dry_run_looks_at_the_folder(self, model, tmp_path):
        old = quantize(model, higgs(), output=tmp_path / "old").output
        assert f"kept from {old} take none" in paley_("quantize", model, "--from", old, "--dry-run").out
        change_tensors(old, lambda found: {name: tensor ^ 1 if name.endswith("codes") else tensor
                                           for name, tensor in found.items()})  # fmt: skip
        assert "codes" in paley_("quantize", model, "--from", old, "--dry-run", code=2).err
        assert "--from" in paley_("quantize", model, "--preset", "higgs-4", "--exact", "--dry-run", code=2).err

    def test_a_text_of_the_hub_that_a_folder_names_is_not_fetched(self, gptq, model, tmp_path):
        plan = json.loads((gptq / "plan.json").read_text())
        plan["recipe"]["calibration"]["source"] = "hub:someone/data"
        plan["recipe"]["test"] = {"source": "hub:someone/data"}
        base = tmp_path / "base"
        shutil.copytree(gptq, base)
        (base / "plan.json").write_text(json.dumps(plan))
        seal(base)
        told = paley_("quantize", model, "--from", base, "--output", tmp_path / "new", code=2).err
        assert "calibration text is hub:someone/data, which is fetched only if you name it" in " ".join(told.split())
        told = paley_("eval", base, code=2).err
        assert "fetched only if you name it; use --data hub:someone/data" in " ".join(told.split())

    def test_another_original(self, nearest, model, tiny_tokenizer, tmp_path):
        other = save_tiny(tmp_path / "other", tiny_tokenizer, intermediate_size=64)
        change_tensors(other, lambda found: {name: tensor * 2 for name, tensor in found.items()})
        with pytest.raises(PaleyError, match="was made of another original, with fingerprint"):
            quantize(other, base=nearest, output=tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            (("seed=1",), r"none of its 16 weights can be kept: .*transform\.seed is 0 there and 1 here"),
            (
                ("rotate=folded",),
                "are in other coordinates: rotation is null there and a Rotation here",
            ),
            (("weights.grid=p2n256", "embedding=null", "head=null"), r"weight\.grid is .* there and p2n256 here"),
        ],
    )
    def test_other_coordinates_or_grids(self, settings, complaint, nearest, model, tmp_path):
        with pytest.raises(PaleyError, match=complaint):
            quantize(model, higgs("calibration.sequences=4", *settings), base=nearest, output=tmp_path / "new")
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "new.run").exists()

    def test_a_damaged_folder(self, model, tmp_path):
        old = quantize(model, higgs(), output=tmp_path / "old").output
        name = "model.layers.0.mlp.up_proj.codes"
        change_tensors(old, lambda found: found | {name: found[name] ^ 1})
        with pytest.raises(PaleyError, match=name.replace(".", r"\.")):
            quantize(model, base=old, output=tmp_path / "new")

    def test_another_version_of_the_format(self, model, tmp_path):
        old = unseal(quantize(model, higgs(), output=tmp_path / "old").output)
        with pytest.raises(PaleyError, match=r"digests\.json: is missing"):
            quantize(model, base=old, output=tmp_path / "new")
        section = json.loads((old / "config.json").read_text())["quantization_config"]
        change_config(old, quantization_config=section | {"format_version": 3})
        with pytest.raises(PaleyError, match="has format version 3, and only codes of version 4 can be kept"):
            quantize(model, base=old, output=tmp_path / "new")

    def test_no_folder_and_no_base(self, model, tmp_path):
        with pytest.raises(PaleyError, match="must be a folder that `paley quantize` wrote"):
            quantize(model, base=tmp_path / "none", output=tmp_path / "new")
        with pytest.raises(PaleyError, match="give one with base"):
            quantize(model, higgs(), exact=True, output=tmp_path / "new")
        with pytest.raises(PaleyError, match="is no Paley checkpoint"):
            quantize(model, base=model, output=tmp_path / "new")


def test_the_command_line(model, tmp_path):
    old = quantize(model, higgs(), output=tmp_path / "old").output
    override = DOWN.replace("METHOD", "nearest")
    args = ["quantize", model, "--from", old, "--output", tmp_path / "new"]
    shown = paley_(*args, "--set", override)
    assert f"kept from {old}: 15 weights, the same bytes" in shown.out
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert found["kept"] == {"digest": paley_digest(old), "weights": 15, "fitted": 0}
    refused = paley_("quantize", model, "--from", old, "--seed", 1, "--output", tmp_path / "no", code=2).err
    assert "leave --from out to quantize all of it" in refused
    assert paley_("quantize", model, "--from", tmp_path, "--output", tmp_path / "no", code=2).err.count("\n") == 1
    assert paley.load(tmp_path / "new") is not None


def paley_digest(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["digest"]
