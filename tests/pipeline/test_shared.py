"""Scores and sensitivities shared by workers: the very figures that one process finds, by processes and by Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import paley
from paley.core.errors import PaleyError
from paley.pipeline import probing, shared_scores
from paley.pipeline.cluster import LOCAL, cluster
from paley.pipeline.pool import Here, Processes
from tiny_models import higgs, save_tiny

SCORED = {"sequences": 19, "seq_len": 24}  # three batches, the last of them smaller
MEASURED = {"source": "random", "sequences": 2, "seq_len": 24, "levels": 4, "method": "noise"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As workers have it: sums of more threads may be added in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["processes", "ray"])
def pool(request) -> Iterator:
    if request.param == "processes":
        with Processes(2) as pool:
            yield pool
        return
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        with cluster(LOCAL, 2) as joined:
            yield joined


@pytest.fixture
def joined(pool, monkeypatch):
    for module in ("score", "sensitivities"):
        monkeypatch.setattr(f"paley.pipeline.{module}.pool_of", lambda *_, **__: nullcontext(pool))


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("shared")
    model = save_tiny(folder / "model", tiny_tokenizer, qwen=True)
    out = paley.quantize(model, higgs("keys={grid: int4}"), output=folder / "out").output
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"Story {n} of {n * n} things. " * 3 for n in range(200)))
    return SimpleNamespace(model=model, out=out, text=str(text))


@pytest.mark.parametrize("compared", [True, False])
def test_workers_score_as_one_process_does(made, joined, compared):
    against = made.model if compared else None
    alone = paley.score(made.out, against, data=made.text, **SCORED)
    shared = paley.score(made.out, against, data=made.text, **SCORED, workers=2)
    assert shared == alone
    assert shared.sequences == 19
    assert (shared.kl is not None) == compared


def test_workers_go_on_with_a_measurement_as_one_process_does(made, joined, tmp_path):
    file = tmp_path / "a.partial.jsonl"
    alone = paley.measure_sensitivity(made.model, **MEASURED, progress_file=file)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + sum(len(slot.levels) for slot in alone.slots.values())
    file.write_text("".join(lines[:3]))  # a run that was stopped early
    assert paley.measure_sensitivity(made.model, **MEASURED, workers=2, progress_file=file) == alone
    assert len(file.read_text().splitlines()) == len(lines)
    assert paley.measure_sensitivity(made.model, **MEASURED, progress_file=file) == alone


def test_a_worker_that_sees_other_weights_stops_it(made):
    job = probing.Probing(str(made.model), "other", torch.ones(1, 4).long(), "kl", ("weight",), False, 0, "cpu", "a")
    with pytest.raises(PaleyError, match="a worker sees other weights here"):
        list(Here().run(probing.make_trial, [(job, probing.NO_NOISE)]))
    batch = shared_scores.Batch(str(made.out), str(made.model), "other", "text", 0, torch.ones(1, 4).long().numpy())
    with pytest.raises(PaleyError, match="a worker sees other weights here"):
        list(Here().run(shared_scores.measure_original, [batch]))


def test_a_worker_holds_one_model(made, monkeypatch):
    monkeypatch.setattr(shared_scores, "_HELD", {})
    for what, kept in (("original", 1), ("head", 1), ("model", 2), ("original", 1)):
        shared_scores._hold(what, "a", lambda: "made")
        assert len(shared_scores._HELD) == kept
    assert shared_scores._hold("original", "a", pytest.fail) == "made"


@pytest.mark.parametrize("how", [{"workers": 2}, {"ray": LOCAL}])
def test_workers_and_gpus_exclude_each_other(made, how, monkeypatch):
    monkeypatch.setattr("paley.pipeline.score.check_device", lambda device: device)
    with pytest.raises(PaleyError, match="device=cuda: workers compute on the CPU; leave workers out"):
        paley.score(made.out, device="cuda", **how)
    with pytest.raises(PaleyError, match="device=cuda: workers compute on the CPU; leave workers out"):
        paley.measure_sensitivity(made.model, device="cuda", **how)
