"""Plans come back from their files exactly, are written whole or not at all, and refuse other models."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme
from paley.core.transforms import Transform
from paley.plan import Plan, Rotation, Trial
from paley.recipe import preset

RECIPE = preset("w3a3kv3")
TURN = Transform(12, 12, 12)


def make_plan(**changes) -> Plan:
    """A plan of 11 layers, their schemes given in a jumbled order."""
    layers = [f"model.layers.{i}" for i in (10, 2, 0, 1, 3, 9, 8, 7, 6, 5, 4)]
    fields = {
        "fingerprint": "f00d",
        "model_type": "llama",
        "recipe": RECIPE,
        "rotation": Rotation(stream=Transform(60, 64, 64, seed=1), heads=Transform(8, 8, 8)),
        "linears": {
            f"{layer}.mlp.{name}": RECIPE.linear_scheme(name, "linear", TURN if name == "down_proj" else None)
            for layer in layers
            for name in ("up_proj", "down_proj")
        },
        "attentions": {f"{layer}.self_attn": RECIPE.attention_scheme(layer) for layer in layers},
        "predicted_loss": 0.1 + 0.2,
        "bits_per_weight": 1 / 3,
        "trace": [Trial(slot="a", clip_ratio=0.7, objective=1e-300)],
    }
    return Plan(**(fields | changes))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "plan.json"


def test_files_give_the_same_plan_back(path):
    for plan in (make_plan(), make_plan(rotation=None, trace=(), linears={}, predicted_loss=None)):
        plan.save(path)
        again = Plan.load(path)
        assert again == plan
        assert isinstance(again.rotation, Rotation | None)
        assert again.to_json() == plan.to_json() == path.read_bytes().decode()


def test_floats_survive_exactly(path):
    generator = random.Random(0)
    values = [generator.uniform(0, 1) * 10.0 ** generator.randint(-300, 300) for _ in range(2000)]
    values += [5e-324, 1.7976931348623157e308, 0.1 + 0.2]
    make_plan(trace=[Trial(slot="s", clip_ratio=v, objective=v) for v in values]).save(path)
    trace = Plan.load(path).trace
    assert [t.objective for t in trace] == [t.clip_ratio for t in trace] == values


def test_an_objective_may_be_infinite_or_nan(path):
    trials = [Trial(slot="s", clip_ratio=0.5, objective=v) for v in (math.inf, math.nan)]
    make_plan(trace=trials, predicted_loss=math.inf).save(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # plain JSON, without Infinity
    again = Plan.load(path)
    assert again.predicted_loss == again.trace[0].objective == math.inf
    assert math.isnan(again.trace[1].objective)
    with pytest.raises(ValidationError, match="finite"):
        Trial(slot="s", clip_ratio=math.nan, objective=1.0)


def test_the_text_is_the_same_for_equal_plans_and_a_line_a_module():
    plan = make_plan()
    backwards = make_plan(
        linears=dict(reversed(plan.linears.items())), attentions=dict(reversed(plan.attentions.items()))
    )
    assert backwards.to_json() == plan.to_json()
    assert list(plan.attentions) == [f"model.layers.{i}.self_attn" for i in range(11)]
    lines = plan.to_json().split("\n")
    assert lines[-1] == ""
    assert json.loads(plan.to_json())["version"] == 2
    name = "model.layers.7.mlp.down_proj"
    clipped = RECIPE.model_copy(update={"inputs": ActivationScheme("odd3", clip_ratio=0.75)})
    changed = make_plan(linears=plan.linears | {name: clipped.linear_scheme(name, "linear", TURN)})
    differing = [(a, b) for a, b in zip(lines, changed.to_json().split("\n"), strict=True) if a != b]
    assert len(differing) == 1
    assert differing[0][0].startswith(f'  "{name}": {{"weight": ')


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_saving_is_all_or_nothing(path, monkeypatch, step):
    plan = make_plan()
    plan.save(path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(step, refuse)
        with pytest.raises(PaleyError, match=r"plan\.json: cannot be written: disk full"):
            make_plan(fingerprint="beef").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    make_plan(fingerprint="beef").save(path)
    assert Plan.load(path).fingerprint == "beef"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("folder", ["missing", "plan.json"])
def test_saving_where_there_is_no_folder(path, folder):
    path.write_text("")
    with pytest.raises(PaleyError, match=r"plan\.json: cannot be written: N"):
        make_plan().save(path.parent / folder / "plan.json")


def test_a_plan_for_another_model_is_refused():
    assert make_plan().check_fingerprint("f00d").fingerprint == "f00d"
    with pytest.raises(PaleyError, match=r"llama model with fingerprint f00d, the model here has beef"):
        make_plan().check_fingerprint("beef")


def put(*keys):
    """A change of a plan's data: the value at keys[:-1] becomes keys[-1]."""

    def change(data):
        for key in keys[:-2]:
            data = data[key]
        data[keys[-2]] = keys[-1]

    return change


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (put("version", 1), "is a plan of version 1, this Paley reads version 2"),
        (put("version", 3), "is a plan of version 3, this Paley reads version 2"),
        (lambda data: data.pop("version"), "is a plan of version null"),
        (put("linear", {}), "linear: unknown key; did you mean 'linears'"),
        (lambda data: data.pop("fingerprint"), "fingerprint: is required and missing"),
        (put("fingerprint", 3), r"fingerprint: should be a valid string \(got 3, integer\)"),
        (put("recipe", "rotat", 1), r"recipe\.rotat: unknown key; did you mean 'rotate'"),
        (put("rotation", "head", None), "rotation.head: unknown key; did you mean 'heads'"),
        (put("rotation", "stream", "order", 3), "rotation.stream: transform: order=3 does not divide out_dim=64"),
        (
            put("linears", DOWN, "transform", "order", 5),
            rf"linears\['{DOWN}'\]\.transform: transform: order=5 does not divide",
        ),
        (
            put("linears", DOWN, "inputs", None),
            rf"linears\['{DOWN}'\]\.inputs: unknown key; did you mean 'input'",
        ),
        (
            put("linears", DOWN, "weight", "grid", "int1"),
            rf"linears\['{DOWN}'\]\.weight\.grid: grid 'int1': bits must be",
        ),
        (put("attentions", "a", None), r"attentions\.a: should be an object \(got null, null\)"),
        (put("trace", 0, "objective", "small"), r"trace\[0\]\.objective: should be a valid number"),
        (put("trace", 0, "clip", 1), r"trace\[0\]\.clip: unknown key; did you mean 'clip_ratio'"),
    ],
)
def test_bad_plans(path, change, complaint):
    data = json.loads(make_plan().to_json())
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PaleyError, match=rf"plan\.json: .*{complaint}"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"is not valid JSON \(line 1, column 1"),
        (b'{"version": 1,\n', r"is not valid JSON \(line 2"),
        (b"[]", "expected a mapping of keys to values, got list"),
        (b'{"version": 1, "version": 1}', "the key 'version' is given twice"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_bad_plan_files(path, content, complaint):
    path.write_bytes(content)
    with pytest.raises(PaleyError, match=rf"plan\.json: .*{complaint}"):
        Plan.load(path)


def test_unreadable_plans(path):
    with pytest.raises(PaleyError, match=r"plan\.json: no such plan"):
        Plan.load(path)
    with pytest.raises(PaleyError, match="cannot be read as a plan"):
        Plan.load(path.parent)
