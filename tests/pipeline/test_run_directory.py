"""The run directory: what a stage finished is kept, and only for a run of the same texts."""

from __future__ import annotations

import math

import pytest

from paley.core.errors import PaleyError
from paley.pipeline.run_directory import RunDirectory
from paley.plan import Trial


def test_a_text_that_changed_is_not_mixed_with_what_was_made_of_the_old_one(tmp_path):
    with RunDirectory(tmp_path / "out").open("key") as run:
        run.check_texts({"test": "a", "calibration": "b"})
    with (
        pytest.raises(PaleyError, match="calibration text has changed"),
        RunDirectory(tmp_path / "out").open("key", resume=True) as run,
    ):
        run.check_texts({"test": "a", "calibration": "c"})


def test_a_refused_run_keeps_what_stages_made_and_nothing_less(tmp_path):
    run = RunDirectory(tmp_path / "out")
    for make in (lambda: run.check_texts({"test": "a"}), lambda: run.stage_file("final", "block-0000").touch()):
        assert not run.path.exists()
        with pytest.raises(PaleyError, match="a bad model"), run.open("key"):  # noqa: PT012
            make()
            raise PaleyError("a bad model")
    with run.open("key", resume=True):
        assert run.stage_file("final", "block-0000").exists()


def test_the_trace_of_a_killed_search_comes_back(tmp_path):
    trials = [Trial(slot="a.keys", clip_ratio=1 / 3, objective=loss) for loss in (0.1, math.inf, 2.0)]
    with RunDirectory(tmp_path / "out").open("key") as run:
        assert run.trials() == []
        for trial in trials[:2]:
            run.add_trial(trial)
    file = run.path / "trace.jsonl"
    file.write_bytes(file.read_bytes() + b'{"slot": "a.ke')  # killed while it wrote
    with RunDirectory(tmp_path / "out").open("key", resume=True) as run:
        assert run.trials() == trials[:2]
        run.add_trial(trials[2])
    with RunDirectory(tmp_path / "out").open("key", resume=True) as run:
        assert run.trials() == trials
    file.write_text(file.read_text() + '{"slot": "a.keys"}\n')
    with (
        pytest.raises(PaleyError, match=r"trace\.jsonl: is damaged .*; .* start anew with --overwrite"),
        RunDirectory(tmp_path / "out").open("key", resume=True) as run,
    ):
        run.trials()


def test_what_a_kill_left_half_written_is_not_published(tmp_path):
    with RunDirectory(tmp_path / "out").open("key") as run:
        folder = run.fresh_checkpoint()
        for name in (".digests.json.77f7d1c6.tmp", "config.json"):
            (folder / name).write_text("{}")
        run.sweep()
        assert [file.name for file in folder.iterdir()] == ["config.json"]
