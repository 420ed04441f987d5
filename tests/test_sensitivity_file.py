"""Sensitivity files come back exactly, a line a slot, and refuse what does not fit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from paley.core.errors import PaleyError
from paley.sensitivity import MeasuredSlot, MeasuredText, Sensitivity

Q, KEYS = "model.layers.0.self_attn.q_proj", "model.layers.10.keys"


def slot(kind="weight", alpha=0.1 + 0.2, **changes) -> MeasuredSlot:
    fields = {"kind": kind, "numel": 64, "alpha": alpha, "stderr": 1 / 3, "levels": ((0.01, -0.002), (0.09, 0.03))}
    return MeasuredSlot(**(fields | changes))


def make(**changes) -> Sensitivity:
    names = [KEYS, "model.layers.2.mlp.up_proj", Q, "model.layers.1.down_input"]
    fields = {
        "fingerprint": "f00d",
        "model_type": "llama",
        "metric": "kl",
        "text": MeasuredText(source="random", sha256="beef", tokens=2048),
        "folded": True,
        "seed": 0,
        "baseline": 0.0,
        "slots": {name: slot("keys" if name == KEYS else "weight") for name in names},
    }
    return Sensitivity(**(fields | changes))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "alpha.json"


def test_files_give_the_same_back(path):
    rng = random.Random(0)
    values = [rng.uniform(0, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(500)]
    found = make(slots={f"s.{i}": slot(alpha=v, levels=((v, -v),), clamped=i == 0) for i, v in enumerate(values)})
    found.save(path)
    assert Sensitivity.load(path) == found
    assert path.read_bytes().decode() == found.to_json()


def test_a_line_a_slot_in_natural_order():
    found = make()
    lines = found.to_json().splitlines()
    slots = [line for line in lines if '"alpha"' in line]
    assert [line.split('"')[1] for line in slots] == list(found.slots)
    assert list(found.slots) == [Q, "model.layers.1.down_input", "model.layers.2.mlp.up_proj", KEYS]
    assert make(slots=dict(reversed(found.slots.items()))).to_json() == found.to_json()


def test_slopes_by_kind():
    assert make().alphas("keys") == {KEYS: 0.1 + 0.2}
    assert KEYS not in make().alphas()
    assert len(make().alphas()) == 3


def test_losses_of_activations_follow_the_levels():
    bent = slot("keys", alpha=2.0, levels=((0.01, 0.1), (0.02, 0.05), (0.04, 0.25)))
    found = [bent.loss(t2) for t2 in (0.0, 0.005, 0.01, 0.025, 0.04, 0.05)]
    assert found == pytest.approx([0.0, 0.05, 0.1, 0.175, 0.25, 0.27])  # the second level is lost in noise
    assert bent.model_copy(update={"kind": "weight"}).loss(0.005) == pytest.approx(0.01)
    assert bent.model_copy(update={"clamped": True}).loss(0.005) == pytest.approx(0.01)
    assert slot("keys", alpha=2.0, levels=()).loss(0.005) == pytest.approx(0.01)


def test_another_model_is_refused():
    assert make().check_fingerprint("f00d").fingerprint == "f00d"
    with pytest.raises(PaleyError, match="a llama model with fingerprint f00d, the model here has beef; use that"):
        make().check_fingerprint("beef")


def test_a_slot_without_a_slope_is_named():
    weight, keys = ("weight", 64), ("keys", 64)
    assert make().check_slots({Q: weight, KEYS: keys}).metric == "kl"
    with pytest.raises(PaleyError, match=r"layers\.0\.self_attn\.v_proj has no slope; did you mean .*q_proj"):
        make().check_slots({Q: weight, "model.layers.0.self_attn.v_proj": weight})
    with pytest.raises(PaleyError, match=r"layers\.1\.keys has no slope; did you mean .*10\.keys.*sensitivity\(kinds="):
        make().check_slots({"model.layers.1.keys": keys})
    with pytest.raises(PaleyError, match=r"layers\.1\.values has no slope; measure it with"):
        make().check_slots({"model.layers.1.values": ("values", 64)})


@pytest.mark.parametrize("wanted", [("weight", 65), ("values", 64)])
def test_a_slot_of_another_make_is_named(wanted):
    with pytest.raises(
        PaleyError, match=rf"10\.keys was measured as keys of 64 values, .* it is {wanted[0]} of {wanted[1]}"
    ):
        make().check_slots({KEYS: wanted})


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_saving_is_all_or_nothing(path, monkeypatch, step):
    make().save(path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(step, refuse)
    with pytest.raises(PaleyError, match=r"alpha\.json: cannot be written: disk full"):
        make(fingerprint="beef").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["alpha.json"]


def put(*keys):
    """A change of the file's data: the value at keys[:-1] becomes keys[-1]."""

    def change(data):
        for key in keys[:-2]:
            data = data[key]
        data[keys[-2]] = keys[-1]

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (put("version", 1), "is a sensitivity file of version 1, this Paley reads version 2"),
        (lambda data: data.pop("version"), "is a sensitivity file of version null"),
        (lambda data: data.pop("fingerprint"), "fingerprint: is required and missing"),
        (lambda data: data.pop("folded"), "folded: is required and missing"),
        (lambda data: data.pop("slots"), "slots: is required and missing"),
        (put("slots", {}), "slots: .*at least 1 item"),
        (put("metric", "ppl"), "metric: should be 'kl' or 'perplexity'"),
        (put("text", "tokens", 0), r"text\.tokens: should be greater than or equal to 1"),
        (put("slots", Q, "alpha", float("nan")), r"q_proj'\]\.alpha: should be a finite number"),
        (put("slots", Q, "alpha", float("inf")), r"q_proj'\]\.alpha: should be a finite number"),
        (put("slots", Q, "alpha", -1.0), r"q_proj'\]\.alpha: should be greater than 0"),
        (put("slots", Q, "alpha", "1"), r"q_proj'\]\.alpha: should be a valid number"),
        (put("slots", Q, "stderr", -1.0), r"q_proj'\]\.stderr: should be greater than or equal to 0"),
        (put("slots", Q, "kind", "bias"), r"q_proj'\]\.kind: should be 'weight', 'input', 'keys' or 'values'"),
        (put("slots", Q, "levels", [[0.1]]), r"q_proj'\]\.levels"),
        (put("slots", Q, "slope", 1.0), r"q_proj'\]\.slope: unknown key"),
        (put("slots", Q, None), r"q_proj'\]: should be an object"),
        (put("slot", {}), "slot: unknown key; did you mean 'slots'"),
    ],
)
def test_bad_files(path, change, complaint):
    data = json.loads(make().to_json())
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PaleyError, match=rf"alpha\.json: .*{complaint}"):
        Sensitivity.load(path)


def test_no_file(path):
    with pytest.raises(PaleyError, match=r"alpha\.json: no such sensitivity file"):
        Sensitivity.load(path)
    path.write_text("{")
    with pytest.raises(PaleyError, match=r"alpha\.json: is not valid JSON"):
        Sensitivity.load(path)
