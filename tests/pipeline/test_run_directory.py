"""The run directory: what is done is done once, whenever the run was killed; what stands in its way is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from paley.core.errors import PaleyError
from paley.pipeline import run_directory
from paley.pipeline.run_directory import RESULTS, RunDirectory, open_run


def make(output: Path, key: str, content: str, *, resume: bool = False, overwrite: bool = False) -> bool:
    """A run in small, step by step as `quantize` takes it -> whether there was anything to do."""
    with open_run(output, key, resume=resume, overwrite=overwrite) as run:
        to_do = not (resume and run.finished) and not (run.checkpoint / RESULTS).exists()
        if to_do:
            run.checkpoint.mkdir()
            (run.checkpoint / "content").write_text(content)
            (run.checkpoint / RESULTS).write_text(json.dumps({"run": key}))
        run.publish()
    return to_do


class Killed(BaseException):
    """As if by SIGKILL: nothing in the package catches it."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): the n-th rename or removal of `publish` (counted from 0) does not happen, nor what follows."""

    def arm(n: int) -> None:
        steps = iter(range(100))

        def killed(real):
            def step(*args, **kwargs):
                if next(steps) >= n:
                    raise Killed
                return real(*args, **kwargs)

            return step

        monkeypatch.setattr(Path, "rename", killed(Path.rename))
        monkeypatch.setattr(run_directory.shutil, "rmtree", killed(shutil.rmtree))

    return arm


@pytest.mark.parametrize("before", [None, "same key", "other key"])
@pytest.mark.parametrize("killed_at", range(5))
def test_a_publication_killed_at_any_step_resumes_to_the_new_output(tmp_path, monkeypatch, kill_at, before, killed_at):
    output = tmp_path / "out"
    if before is not None:
        make(output, before, "old")
    kill_at(killed_at)
    if killed_at < (2 if before is None else 4):
        with pytest.raises(Killed):
            make(output, "same key", "new", overwrite=before is not None)
    else:
        make(output, "same key", "new", overwrite=before is not None)
    monkeypatch.undo()
    assert not make(output, "same key", "made twice", resume=True)
    assert (output / "content").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_publication_killed_halfway_gives_the_old_output_back_to_a_run_that_starts_anew(
    tmp_path, monkeypatch, kill_at
):
    output = tmp_path / "out"
    make(output, "key", "old")
    kill_at(1)
    with pytest.raises(Killed):
        make(output, "key", "new", overwrite=True)
    monkeypatch.undo()
    assert not output.exists()
    with pytest.raises(PaleyError, match="a bad model"), open_run(output, "other", resume=False, overwrite=True):
        raise PaleyError("a bad model")
    assert (output / "content").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_what_appears_while_a_publication_is_half_done_costs_nothing(tmp_path, monkeypatch, kill_at, how):
    output = tmp_path / "out"
    make(output, "key", "old")
    kill_at(1)
    with pytest.raises(Killed):
        make(output, "key", "new", overwrite=True)
    monkeypatch.undo()
    make(tmp_path / "other", "other key", "beside")
    (tmp_path / "other").rename(output)
    with pytest.raises(PaleyError, match=r"out: exists already, .*out\.run/replaced .*; move one of the two away"):
        make(output, "key", "made twice", **how)
    kept = [(folder / "content").read_text() for folder in (output, tmp_path / "out.run" / "replaced")]
    assert kept == ["beside", "old"]
    output.rename(tmp_path / "other")
    assert not make(output, "key", "made twice", resume=True)
    assert (output / "content").read_text() == "new"


def test_a_refused_run_leaves_no_folder(tmp_path):
    with (
        pytest.raises(PaleyError, match="a bad model"),
        open_run(tmp_path / "x" / "y" / "out", "key", resume=False, overwrite=False),
    ):
        raise PaleyError("a bad model")
    assert list(tmp_path.iterdir()) == []


def test_a_removal_killed_halfway_leaves_a_finished_run(tmp_path, monkeypatch):
    def half(path, **kwargs):
        (Path(path) / "lock").unlink(missing_ok=True)
        raise Killed

    output = tmp_path / "out"
    make(output, "key", "old")
    with monkeypatch.context() as patch:
        patch.setattr(run_directory.shutil, "rmtree", half)
        with pytest.raises(Killed):
            make(output, "key", "new", overwrite=True)
    assert not make(output, "key", "made twice", resume=True)
    assert (output / "content").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_of_the_same_key_is_made_anew_unless_resumed(tmp_path):
    output = tmp_path / "out"
    assert make(output, "key", "old")
    assert not make(output, "key", "new", resume=True)
    assert make(output, "key", "new", overwrite=True)
    assert (output / "content").read_text() == "new"


def test_an_overwrite_killed_at_work_is_not_taken_for_finished(tmp_path):
    output = tmp_path / "out"
    make(output, "key", "old")
    with open_run(output, "key", resume=False, overwrite=True):
        pass
    assert make(output, "key", "new", resume=True)
    assert (output / "content").read_text() == "new"


def test_resume_finishes_no_run_of_other_settings(tmp_path):
    output = tmp_path / "out"
    with open_run(output, "key", resume=False, overwrite=False) as run:
        run.block_file("final", 0).write_text("codes")
    with pytest.raises(PaleyError, match="of another model or other settings"):
        make(output, "other key", "new", resume=True)
    with open_run(output, "key", resume=True, overwrite=False) as run:
        assert run.block_file("final", 0).read_text() == "codes"
    # A folder without run.json says nothing about what its files belong to.
    (run.path / "run.json").unlink()
    with pytest.raises(PaleyError, match="is no run directory of Paley"):
        make(output, "other key", "new", resume=True)
    assert run.block_file("final", 0).read_text() == "codes"


def test_a_folder_of_someone_else_is_never_deleted(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(PaleyError, match="was not made by Paley"):
        make(output, "key", "new", overwrite=True)
    other = tmp_path / "other"
    with (  # noqa: PT012
        pytest.raises(PaleyError, match="appeared while this run was at work"),
        open_run(other, "key", resume=False, overwrite=False) as run,
    ):
        run.checkpoint.mkdir()
        other.mkdir()
        (other / "thesis.txt").write_text("precious")
        run.publish()
    assert (output / "thesis.txt").read_text() == (other / "thesis.txt").read_text() == "precious"


def test_a_text_that_changed_is_not_mixed_with_what_was_made_of_the_old_one(tmp_path):
    with open_run(tmp_path / "out", "key", resume=False, overwrite=False) as run:
        run.check_texts({"test": "a", "calibration": "b"})
    with (
        pytest.raises(PaleyError, match="calibration text has changed"),
        open_run(tmp_path / "out", "key", resume=True, overwrite=False) as run,
    ):
        run.check_texts({"test": "a", "calibration": "c"})


@pytest.mark.parametrize("output", ["/", "//", "/.."])
def test_a_folder_without_a_name_is_refused(output):
    with pytest.raises(PaleyError, match="is no name for a new folder"):
        RunDirectory(Path(output), "key")


def test_names_that_are_no_names_stand_for_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("", ".", "out/.."):
        assert RunDirectory(Path(output), "key").path == tmp_path.with_name(tmp_path.name + ".run")
    assert RunDirectory(Path("out"), "key").path == tmp_path / "out.run"
