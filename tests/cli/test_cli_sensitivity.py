"""`paley sensitivity`, run on a random model of two layers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from command_line import paley_
from paley.model.sensitivity import NoiseProbe
from paley.sensitivity import Sensitivity

SIZES = ["--sequences", 2, "--seq-len", 24, "--levels", 3]


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli-sensitivity") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_tables_file_and_what_to_type_next(model, tmp_path):
    output = tmp_path / "alpha.json"
    shown = paley_("sensitivity", model, "--output", output, "--text", "random", *SIZES, "--activations")
    found = Sensitivity.load(output)
    assert len(found.slots) == 14 + 2 + 12
    steepest = max(found.slots, key=lambda name: found.slots[name].alpha)
    assert "largest of 28 slopes" in shown.out
    first = next(line for line in shown.out.splitlines() if line.strip().startswith("model."))
    assert first.split()[0] == steepest
    rows = {line.split()[0]: line.split()[-1] for line in shown.out.splitlines() if line.strip()}
    for kind in ("q", "k", "v", "o", "gate", "up", "down", "attn_input", "keys", "values"):
        assert float(rows[kind]) > 0
    downs = [slot.alpha for name, slot in found.slots.items() if name.endswith("down_proj")]
    assert float(rows["down"]) == pytest.approx(sum(downs) / 2, rel=1e-3)
    assert "on 48 tokens of random; it grows by alpha · t²" in shown.out
    assert f"written to {output}" in shown.out
    following = next(line for line in shown.out.splitlines() if line.startswith("next: "))
    assert shlex.split(following)[1:] == [
        "paley", "quantize", str(model), "--target-bpw", "3.25", "--sensitivity", str(output),
        "--set", "test.seq_len=128", "--output", "OUT",
    ]  # fmt: skip
    assert [line.split(" s  ")[1] for line in shown.err.splitlines()][:2] == [
        "checking the checkpoint",
        "measuring sensitivities",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["alpha.json"]


def test_gradients_tell_of_kl_and_share_nothing(model, tmp_path):
    args = ["sensitivity", model, "--output", tmp_path / "alpha.json", *SIZES]
    bad = paley_(*args, "--metric", "perplexity", "--method", "gradients", code=2)
    assert "gradients tell of kl, not of perplexity; use --method noise" in bad.err
    bad = paley_(*args, "--workers", "2", code=2)
    assert "workers share trials of noise; add --method noise" in bad.err
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_that_holds_the_file(model, tmp_path):
    output = tmp_path / "alpha.json"
    args = [model, "--output", output, "--metric", "perplexity", *SIZES, "--fold", "--json"]
    found = json.loads(paley_("sensitivity", *args).out)
    assert found.keys() == {"output", "seconds", "peak_memory_bytes", "sensitivity"}
    assert found["output"] == str(output)
    assert found["sensitivity"] == json.loads(output.read_text())
    assert found["sensitivity"]["metric"] == "perplexity"
    assert found["sensitivity"]["text"]["source"] == "self"
    assert found["sensitivity"]["folded"] is True


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(model, tmp_path, monkeypatch):
    output, partial = tmp_path / "alpha.json", tmp_path / "alpha.json.partial.jsonl"
    args = [model, "--text", "random", *SIZES, "--method", "noise", "--output"]
    paley_("sensitivity", *args, tmp_path / "whole.json")
    delta, calls = NoiseProbe.delta, []

    def interrupted(self, slot, t, draw):
        calls.append(slot)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return delta(self, slot, t, draw)

    monkeypatch.setattr(NoiseProbe, "delta", interrupted)
    shown = paley_("sensitivity", *args, output, code=130)
    assert f"what is finished is kept in {partial}" in shown.err
    assert not output.exists()
    assert "an unfinished measurement is here; go on with --resume" in paley_("sensitivity", *args, output, code=2).err
    command = shlex.split(shown.err.splitlines()[-1])
    assert command == ["paley", "sensitivity", *map(str, args), str(output), "--resume"]
    paley_("sensitivity", *command[2:])
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_gradients_leave_finished_trials_alone(model, tmp_path, resume):
    output, partial = tmp_path / "alpha.json", tmp_path / "alpha.json.partial.jsonl"
    partial.write_text("hours of work\n")
    shown = paley_("sensitivity", model, "--output", output, "--text", "random", *SIZES, *resume, code=2)
    assert partial.read_text() == "hours of work\n"
    if resume:
        assert "has finished trials of noise; go on with --method noise, or --overwrite" in shown.err


def test_overwrite_starts_anew(model, tmp_path):
    output, partial = tmp_path / "alpha.json", tmp_path / "alpha.json.partial.jsonl"
    output.write_text("old")
    partial.write_text("of another run\n")
    args = [model, "--output", output, "--text", "random", *SIZES]
    assert "exists already" in paley_("sensitivity", *args, code=2).err
    assert output.read_text() == "old"
    paley_("sensitivity", *args, "--overwrite")
    assert Sensitivity.load(output).seed == 0
    assert not partial.exists()
    assert "exists already" in paley_("sensitivity", *args, "--resume", code=2).err


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("NO_MODEL --output a.json", "NO_MODEL: no such folder"),
        ("MODEL --output a.json --seq-len 24 --text no.txt", "no.txt: no such text file"),
        ("MODEL --output a.json --text random --metric perplexity", "perplexity of random tokens means nothing"),
        ("MODEL --output a.json --levels 1", "at least 3 noise levels"),
        (
            "MODEL --output a.json --text pydoc --seq-len 24 --sequences 100000",
            "use --sequences ",
        ),
        ("MODEL --output a.json --device tpu", "--device tpu: no such device"),
        ("MODEL --output .", ".: is a folder"),
        ("MODEL --output no/a.json", "there is no folder no"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(model, tmp_path, monkeypatch, args, complaint):
    monkeypatch.chdir(tmp_path)
    shown = paley_("sensitivity", *(model if arg == "MODEL" else arg for arg in args.split()), code=2)
    assert shown.out == ""
    assert complaint in shown.err.splitlines()[-1]
    assert shown.err.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example():
    assert "Example: paley sensitivity" in paley_("sensitivity", "--help").out
