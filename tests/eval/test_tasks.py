"""Tasks of lm-eval through the quantized cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import paley
from command_line import paley_
from every_type import tiny_model
from paley.eval import tasks
from paley.eval.tasks import TASKS, check_tasks, compare_tasks, log_likelihoods
from paley.recipe import apply_settings
from tiny_models import save_tiny

DOCUMENTS = {
    "arc_easy": {"question": "What is {n}?", "choices": ["one", "two {n}", "three"], "label": 1},
    "arc_challenge": {"question": "Why {n}?", "choices": ["so", "no", "yes {n}", "ever"], "label": 0},
    "hellaswag": {
        "ctx_a": "A man {n}", "ctx_b": "goes", "activity_label": "Walking", "label": 2,
        "endings": ["home.", "out {n}.", "up.", "x."],
    },
    "lambada_openai": {"text": "The number is {n} and so is the other {n}"},
    "piqa": {"goal": "To count {n}", "sol1": "use hands", "sol2": "use {n} feet", "label": 0},
    "winogrande": {"sentence": "Sarah {n} and Ann met, _ left.", "option1": "Sarah", "option2": "Ann", "answer": "2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    for name, document in DOCUMENTS.items():
        rows = [json.loads(json.dumps(document).replace("{n}", str(n))) for n in range(6)]
        (made / TASKS[name][0]).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", tiny_tokenizer, initializer_range=0.4)


@pytest.fixture(scope="module")
def two_bits(model) -> Path:
    """The same weights; keys and values in 2 bits."""
    out = model.with_name("kv2")
    paley.quantize(model, apply_settings(paley.preset("rtn-w16a16kv2"), ["test=null"]), output=out)
    return out


def plain(model: torch.nn.Module, context: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())


def test_likelihoods_are_those_of_one_forward_and_contexts_are_shared(two_bits):
    model = paley.load(two_bits)
    texts = [((5, 6, 7), (8, 9)), ((9,), (5,)), ((5, 6, 7), (11, 12, 13)), (tuple(range(10, 200)), (4, 5))]
    found = log_likelihoods(model, texts)
    for (context, answer), (value, greedy) in zip(texts, found, strict=True):
        assert value == pytest.approx(plain(model, list(context), list(answer)), abs=2e-3)
        assert not greedy
    best = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert log_likelihoods(model, [((5, 6, 7), (best,))])[0][1]


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1", "qwen3_5_text"])
def test_each_answer_to_a_question_begins_from_the_states_of_the_question(kind):
    """Layers with states beside others, and with states and attention in one."""
    model = tiny_model(kind)
    texts = [(tuple(range(10, 30)), (60 + i, 70, 80 + i)) for i in range(5)]
    for (context, answer), (value, _) in zip(texts, log_likelihoods(model, texts), strict=True):
        assert value == pytest.approx(plain(model, list(context), list(answer)), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_cache_of_two_bits_changes_the_score(model, two_bits, folder):
    pytest.importorskip("lm_eval", reason="needs lm-eval, of paley[tasks]")
    args = ["eval", two_bits, "--tasks", ",".join(TASKS), "--task-data", folder, "--against", model, "--json"]
    found = json.loads(paley_(*args, "--limit", 5).out)["tasks"]
    assert {score["task"] for score in found} == set(TASKS)
    assert all(score["documents"] == 5 for score in found)
    assert any(score["gap"] != 0 for score in found)
    for score in found:
        assert score["gap"] == pytest.approx(score["score"] - score["original"])
        assert 0 <= score["score"] <= 1
    shown = paley_("eval", two_bits, "--tasks", "piqa", "--task-data", folder, "--limit", 2).out
    assert "acc_norm" in shown


@pytest.mark.filterwarnings("ignore")
def test_the_files_of_every_task_are_read(model, shared_dir):
    """Those in the shared folder, as they are published; `DOCUMENTS` above are made up in their form."""
    data = shared_dir / "data" / "tasks"
    if not data.is_dir():
        pytest.skip(f"needs the files of tasks: {data} is not here")
    pytest.importorskip("lm_eval", reason="needs lm-eval, of paley[tasks]")
    found = json.loads(
        paley_("eval", model, "--tasks", ",".join(TASKS), "--task-data", data, "--limit", 1, "--json").out
    )
    assert {score["task"]: score["documents"] for score in found["tasks"]} == dict.fromkeys(TASKS, 1)


def test_differences_are_paired():
    ours, theirs = {"t": {"acc": [1.0, 0.0, 1.0, 1.0]}}, {"t": {"acc": [1.0, 1.0, 0.0, 1.0]}}
    (score,) = compare_tasks(ours, theirs)
    assert (score.score, score.original, score.gap) == (0.75, 0.75, 0.0)
    assert score.gap_stderr == pytest.approx((2 / 3 / 4) ** 0.5)
    assert compare_tasks({"t": {"acc": [1.0]}})[0].stderr is None


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--tasks", "arc_eazy", "--task-data", "."], "'arc_eazy' is none of arc_easy, .*; did you mean 'arc_easy'?"),
        (["--tasks", "piqa"], "name their folder with --task-data (piqa_validation.jsonl)"),
        (["--tasks", "piqa", "--task-data", "nowhere"], "nowhere: has no piqa_validation.jsonl"),
        (["--tasks", ",", "--task-data", "."], "--tasks: names none"),
        (["--limit", "3"], "--limit: is for tasks; name some with --tasks"),
    ],
)
def test_bad_arguments(model, args, complaint):
    err = paley_("eval", model, *args, code=2).err
    assert all(part in err for part in complaint.split(".*"))


def test_without_lm_eval_it_says_what_to_install(monkeypatch, folder):
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(paley.PaleyError, match=r'lm-eval is not installed; pip install "paley\[tasks\]"'):
        check_tasks(["piqa"], folder)
