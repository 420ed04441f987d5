"""What a run is said to take beforehand: bytes to the byte, its stages, and memory that will not suffice."""

from __future__ import annotations

import pytest

import paley
from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.pipeline import estimate, execute
from paley.pipeline.estimate import Estimate, check_memory, estimate_run, faster
from paley.pipeline.monitor import Pace, duration
from paley.pipeline.resolve import resolve
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

SIZES = [
    f"{part}.{size}" for part in ("calibration", "search", "test") for size in ("sequences=2", "seq_len=16")
] + ["hadamard=16", "search.iterations=1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("models") / "model", tiny_tokenizer)


class Seen(paley.Monitor):
    def __init__(self):
        self.expected, self.stages, self.notes = {}, [], []

    def expect(self, stages):
        self.expected = dict(stages)

    def stage(self, name, total):
        self.stages.append(name)

    def note(self, text):
        self.notes.append(text)


RECIPES = [
    ("llama", "w4a16", []),
    ("llama", "w4a4kv4", ["diagonal=true", "test=null"]),
    ("llama", "higgs-4", ["test=null"]),
    ("llama", "w4a16e16h16", ["calibration.source=self", "test.source=pydoc"]),
    ("llama", "gbs-w4a4kv4", ["expand=16", "hadamard=1024"]),
    ("llama", "gbs-w4a4kv4", ["search.source=self"]),
    ("llama", "higgs-w4a4kv4", ["search.method=gbs", "calibration.source=self", "test.source=pydoc"]),
    ("llama", "higgs-4", ["tune={sequences: 2}", "calibration.source=self", "test.source=pydoc"]),
    ("llama", "w1a4", ["weights.group_size=16", "inputs.group_size=16", "fit_groups=true"]),
    ("qwen", "w4a4kv4", []),
    ("qwen", "higgs-4", []),
    ("qwen", "w16a16kv4", []),
]


@pytest.mark.parametrize(("kind", "name", "settings"), RECIPES)
def test_bytes_and_stages_are_those_of_the_run(kind, name, settings, tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=kind == "qwen", gains=True)
    recipe = apply_settings(preset(name), [*SIZES, *settings])
    expected = paley.estimate(folder, recipe)
    seen = Seen()
    made = paley.quantize(folder, recipe, output=tmp_path / "out", monitor=seen)
    assert expected.bytes == made.results.bytes
    assert expected.original_bytes == made.results.original_bytes
    assert list(expected.stages) == seen.stages[1:]
    assert list(seen.expected) == list(expected.stages)
    assert all(seconds > 0 for seconds in expected.stages.values())
    assert seen.notes[0].startswith("estimate: ")


@pytest.mark.parametrize(
    ("name", "limits"),
    [("w4a16", "weights: 4"), ("w4a4kv4", "weights: 4, kv: 4, inputs: 4.5"), ("balanced-4", "weights: 4")],
)
def test_stages_of_a_budget_are_those_of_the_run(name, limits, tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, gains=True)
    recipe = apply_settings(preset(name), [*SIZES, f"budget={{{limits}, sequences: 4, seq_len: 32}}"])
    expected, seen = paley.estimate(folder, recipe), Seen()
    paley.quantize(folder, recipe, output=tmp_path / "out", monitor=seen)
    assert list(expected.stages) == seen.stages[1:]
    assert all(seconds > 0 for seconds in expected.stages.values())


def test_a_plan_is_not_searched_again(model, tmp_path):
    recipe = apply_settings(preset("gbs-w4a4kv4"), SIZES)
    plan = paley.make_plan(model, recipe)
    assert "searching clip ratios" in paley.estimate(model, recipe).stages
    assert "searching clip ratios" not in paley.estimate(model, plan=plan).stages


@pytest.fixture
def steady(monkeypatch):
    """A machine of a known rate."""
    monkeypatch.setattr(estimate, "multiplications", lambda: 1e11)


def problem_of(model, name, *settings):
    recipe = apply_settings(preset(name), [*SIZES, *settings])
    return resolve(open_source(model), recipe), recipe


def test_more_text_takes_longer_and_more_memory(model, steady):
    def seconds_and_memory(*settings):
        found = estimate_run(*problem_of(model, "w4a4kv4", *settings))
        return found.stages["quantizing weights"], found.memory

    few, some, many = (seconds_and_memory(f"calibration.sequences={n}") for n in (200, 300, 400))
    assert many[0] - some[0] == pytest.approx(some[0] - few[0])
    assert few[0] < some[0]
    assert few[1] < some[1] < many[1]


def test_diagonals_read_a_few_sequences_of_a_text(model, steady, tmp_path, monkeypatch):
    enough = ["calibration.source=pydoc", "calibration.sequences=64", "test=null"]  # 1,024 tokens
    more = [*enough, "calibration.sequences=100"]
    for name, read in (("balanced-4", 64), ("w4a16", 100), ("w16a16kv4", 0)):
        assert problem_of(model, name, *more)[0].sequences_read(100, 16) == read
    few, many = (problem_of(model, "balanced-4", *settings) for settings in (enough, more))
    assert estimate_run(*few).stages == estimate_run(*many).stages
    seen = []

    class Seeing(execute.ModelQuantizer):
        def __init__(self, runner, ids, *others, **named):
            seen.append(len(ids))
            super().__init__(runner, ids, *others, **named)

    monkeypatch.setattr(execute, "ModelQuantizer", Seeing)
    made = [paley.quantize(model, recipe, output=tmp_path / str(i)) for i, (_, recipe) in enumerate((few, many))]
    assert seen == [64, 64]
    codes = [sorted(path.read_bytes() for path in tmp_path.glob(f"{i}/*.safetensors")) for i in range(len(made))]
    assert codes[0]
    assert codes[0] == codes[1]


def test_text_that_the_model_writes_to_tune_on_takes_time(model, steady):
    given = ["calibration.source=self", "test=null"]
    few, many = (estimate_run(*problem_of(model, "w4a16", *given, f"tune={{sequences: {n}}}")).stages for n in (2, 20))
    assert many["sampling the calibration text"] > few["sampling the calibration text"]


def test_text_that_the_model_writes_for_a_budget_takes_time(model, steady):
    budget = "budget={weights: 4, sequences: 4, seq_len: 32, source: %s}"
    both = [problem_of(model, "higgs-4", "test=null", budget % source) for source in ("self", "pydoc")]
    own, given = (estimate_run(*each) for each in both)
    assert own.stages["measuring sensitivities"] > given.stages["measuring sensitivities"]


def test_a_run_that_needs_more_memory_than_is_free_is_refused_with_what_fits(model):
    problem, recipe = problem_of(model, "w4a16", "calibration.sequences=4096", "calibration.seq_len=512", "test=null")
    needed = estimate_run(problem, recipe).memory
    check_memory(problem, recipe, needed, needed)
    few = apply_settings(recipe, ["calibration.sequences=512"])
    free = estimate_run(problem, few).memory
    assert free < needed
    with pytest.raises(
        PaleyError, match=r"needs about [\d.]+ GiB, and [\d.]+ GiB are free; use calibration\.sequ"
    ) as e:
        check_memory(problem, recipe, needed, free)
    assert str(e.value).endswith("calibration.sequences=512")
    with pytest.raises(PaleyError, match=r"use the preset higgs-4 without a score"):
        check_memory(problem, recipe, needed, 2**20)
    check_memory(*problem_of(model, "higgs-4", "test=null"), needed=2**20, free=2**20)


def test_memory_is_checked_before_anything_is_made(model, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "free_memory", lambda: 2**20)
    with pytest.raises(PaleyError, match="memory: this run needs about"):
        paley.quantize(model, apply_settings(preset("w4a16"), SIZES), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_slow_run_is_told_what_is_faster(model, steady, monkeypatch):
    problem, recipe = problem_of(model, "gbs-w4a4kv4", "search.sequences=100")
    quick = estimate_run(problem, recipe)
    assert faster(problem, recipe, quick) == ""
    monkeypatch.setattr(estimate, "multiplications", lambda: 1e6)
    slow = estimate_run(problem, recipe)
    said = faster(problem, recipe, slow)
    assert said.startswith("faster, perhaps less accurate: search.method=none, ")
    assert "the preset higgs-4, without calibration, " in said
    streamed, recipe = problem_of(model, "higgs-4")
    assert faster(streamed, recipe, estimate_run(streamed, recipe)) == ""


def test_an_estimate_in_words():
    found = Estimate(bytes=74_832_000, original_bytes=269_030_016, memory=3 * 2**30, stages={"a": 60.0, "b": 15.4})
    assert str(found) == "estimate: 75 s, 3.0 GiB of memory, 74.8 MB on disk (the original 269.0)"
    assert [duration(s) for s in (7, 99, 100, 5000, 20_000)] == ["7 s", "99 s", "2 min", "83 min", "5.6 h"]


def test_time_left_starts_at_the_estimate_and_follows_the_pace():
    """Each step takes twice as long as estimated: after some of them the rest does, too, the next stage included."""
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.left() is None
    pace.expect({"first": 100.0, "second": 50.0})
    pace.stage("first", 100)
    assert pace.left() == pytest.approx(150)
    for step in range(1, 101):
        now[0] += 2
        pace.step()
        left = pace.left()
        assert left is not None
        assert left <= 2 * (150 - step)
        if step >= 30:
            assert left == pytest.approx(2 * (150 - step), rel=0.15)
    now[0] += 1
    assert pace.left() == pytest.approx(left - 1)
    pace.stage("second", 1)
    assert pace.left() == pytest.approx(100, rel=0.1)
    pace.step()
    assert pace.left() == 0


def test_steps_that_a_resumed_run_had_already_do_not_make_the_rest_short():
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.expect({"first": 200.0})
    pace.stage("first", 200)
    for _ in range(100):
        pace.step()
    for _ in range(60):
        now[0] += 1
        pace.step()
    assert pace.left() == pytest.approx(40, rel=0.1)


def test_time_left_of_a_stage_that_nobody_estimated():
    now = [5.0]
    pace = Pace(lambda: now[0])
    pace.stage("alone", 4)
    assert pace.left() is None
    now[0] += 10
    pace.step()
    assert pace.left() == pytest.approx(30)
