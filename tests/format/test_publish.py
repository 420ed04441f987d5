"""Publishing: what is done is done once, whenever the run was killed; nothing in its way is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from paley.core.errors import PaleyError
from paley.format.publish import RESULTS, Work, check_file, exchange, restore


@pytest.fixture
def folders(tmp_path):
    """(new, place, aside), the last of which is not there."""
    new, place, aside = (tmp_path / name for name in ("new", "place", "aside"))
    for folder in (new, place):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    return new, place, aside


def test_the_old_folder_is_kept_aside(folders):
    new, place, aside = folders
    exchange(*folders)
    assert ((place / "name").read_text(), (aside / "name").read_text(), new.exists()) == ("new", "place", False)
    restore(*folders)  # of a whole exchange
    assert (place / "name").read_text() == "new"


def test_half_an_exchange_is_undone(folders):
    new, place, aside = folders
    place.rename(aside)
    restore(*folders)
    assert (place / "name").read_text() == "place"
    with pytest.raises(PaleyError, match=r"place: cannot be written: No such file .* or choose another --output"):
        exchange(new / "missing", place, aside)
    assert ((place / "name").read_text(), aside.exists()) == ("place", False)


def test_what_comes_between_the_two_steps_of_an_exchange_costs_nothing(folders):
    _, place, aside = folders
    place.rename(aside)
    place.mkdir()
    (place / "name").write_text("stranger")
    for step in (restore, exchange):
        with pytest.raises(PaleyError, match=r"place: exists already, .*aside .*; move one of the two away"):
            step(*folders)
    assert [(folder / "name").read_text() for folder in folders] == ["new", "stranger", "place"]
    (place / "name").unlink()
    place.rmdir()
    exchange(*folders)
    assert [(folder / "name").read_text() for folder in (place, aside)] == ["new", "place"]


def test_what_cannot_be_moved_stays_where_it_is(folders, monkeypatch):
    new, place, aside = folders
    rename = Path.rename

    def refuse(self: Path, target: Path) -> None:
        if self == new:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PaleyError, match="place: cannot be written: Directory not empty"):
        exchange(*folders)
    assert ((new / "name").read_text(), (place / "name").read_text(), aside.exists()) == ("new", "place", False)


# --- runs -------------------------------------------------------------------------------------------------


def make(
    output: Path, key: str, content: str, *, resumable: bool = True, at_publish: Callable[[], None] = lambda: None,
    **flags: bool,
) -> bool:  # fmt: skip
    """A run in small, step by step as `quantize` takes it -> whether there was anything to do."""
    with Work(output, resumable=resumable).open(key, **flags) as run:
        to_do = not (flags.get("resume") and run.finished) and not (run.new / RESULTS).exists()
        if to_do:
            run.new.mkdir()
            (run.new / "content").write_text(content)
            (run.new / RESULTS).write_text(json.dumps({"run": key}))
        at_publish()
        assert run.publish() == ()
    return to_do


class Killed(BaseException):
    """As if by SIGKILL: nothing in the package catches it."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): from now on the n-th rename or removal (counted from 0) does not happen, nor what follows."""

    def arm(n: int) -> None:
        steps = iter(range(100))

        def killed(real):
            def step(*args, **kwargs):
                if next(steps) >= n:
                    raise Killed
                return real(*args, **kwargs)

            return step

        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, killed(getattr(owner, name)))

    return arm


@pytest.mark.parametrize("before", [None, "same key", "other key"])
@pytest.mark.parametrize("killed_at", range(9))
def test_a_publication_killed_at_any_step_resumes_to_the_new_output(tmp_path, monkeypatch, kill_at, before, killed_at):
    output = tmp_path / "out"
    if before is not None:
        make(output, before, "old")
    killed = pytest.raises(Killed) if killed_at < (3 if before is None else 8) else nullcontext()
    with killed:
        make(output, "same key", "new", overwrite=before is not None, at_publish=lambda: kill_at(killed_at))
    monkeypatch.undo()
    assert not make(output, "same key", "made twice", resume=True)
    assert (output / "content").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("killed_at", range(9))
def test_what_cannot_be_resumed_loses_nothing_and_blocks_nothing(tmp_path, monkeypatch, kill_at, before, killed_at):
    output = tmp_path / "out"
    if before:
        make(output, "key", "old", resumable=False)
    with suppress(Killed):
        make(output, "key", "new", resumable=False, overwrite=before, at_publish=lambda: kill_at(killed_at))
    monkeypatch.undo()
    if before:
        with pytest.raises(PaleyError, match="out: exists already"):
            make(output, "key", "newer", resumable=False)
        assert (output / "content").read_text() == ("new" if killed_at > 1 else "old")
    make(output, "key", "newer", resumable=False, overwrite=True)
    assert (output / "content").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_publication_killed_halfway_gives_the_old_output_back_to_a_run_that_starts_anew(
    tmp_path, monkeypatch, kill_at
):
    output = tmp_path / "out"
    make(output, "key", "old")
    with pytest.raises(Killed):
        make(output, "key", "new", overwrite=True, at_publish=lambda: kill_at(1))
    monkeypatch.undo()
    assert not output.exists()
    with pytest.raises(PaleyError, match="a bad model"), Work(output, resumable=True).open("other", overwrite=True):
        raise PaleyError("a bad model")
    assert (output / "content").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_what_appears_while_a_publication_is_half_done_costs_nothing(tmp_path, monkeypatch, kill_at, how):
    output = tmp_path / "out"
    make(output, "key", "old")
    with pytest.raises(Killed):
        make(output, "key", "new", overwrite=True, at_publish=lambda: kill_at(1))
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
        Work(tmp_path / "x" / "y" / "out", resumable=True).open("key"),
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
        patch.setattr(shutil, "rmtree", half)
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
    with Work(output, resumable=True).open("key", overwrite=True):
        pass
    assert make(output, "key", "new", resume=True)
    assert (output / "content").read_text() == "new"


def test_resume_finishes_no_run_of_other_settings(tmp_path):
    output = tmp_path / "out"
    with Work(output, resumable=True).open("key") as run:
        (run.path / "codes").write_text("codes")
    with pytest.raises(PaleyError, match="of another model or other settings"):
        make(output, "other key", "new", resume=True)
    with Work(output, resumable=True).open("key", resume=True) as run:
        assert (run.path / "codes").read_text() == "codes"
    # A folder without run.json says nothing about what its files belong to.
    (run.path / "run.json").unlink()
    with pytest.raises(PaleyError, match="is no work folder of Paley"):
        make(output, "other key", "new", resume=True)
    assert (run.path / "codes").read_text() == "codes"


def test_a_folder_of_someone_else_is_never_deleted(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(PaleyError, match="was not made by Paley"):
        make(output, "key", "new", overwrite=True)
    other = tmp_path / "other"
    with (  # noqa: PT012
        pytest.raises(PaleyError, match="appeared while this run was at work"),
        Work(other, resumable=True).open("key") as run,
    ):
        run.new.mkdir()
        other.mkdir()
        (other / "thesis.txt").write_text("precious")
        run.publish()
    assert (output / "thesis.txt").read_text() == (other / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize(
    ("names", "ours"),
    [([], True), (["lock"], True), (["lock", ".run.json.1a2b.tmp"], True), ([".profile"], False), (["new"], False)],
)
def test_a_work_folder_is_known_by_its_state_which_is_written_first(tmp_path, resumable, names, ours):
    work = Work(tmp_path / "out", resumable=resumable).path
    work.mkdir()
    for name in names:
        (work / name).touch()
    refused = pytest.raises(PaleyError, match="is no work folder of Paley; move it away, or choose another --output")
    with nullcontext() if ours else refused:
        make(tmp_path / "out", "key", "new", resumable=resumable, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out" if ours else work.name]


def test_progress_that_cannot_be_cleared_is_not_taken_for_that_of_another_run(tmp_path, monkeypatch):
    run = Work(tmp_path / "out", resumable=True)
    with run.open("key"):
        (run.path / "final").mkdir()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> None:
        if self.name == "final":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    for flag in ("overwrite", "resume"):
        with pytest.raises(PaleyError, match=r"out\.run/final: cannot be deleted; delete it yourself, or choose"):
            make(tmp_path / "out", "other key", "new", **{flag: True})
    assert not run.output.exists()


@pytest.mark.parametrize("output", ["/", "//", "/.."])
def test_a_folder_without_a_name_is_refused(output):
    with pytest.raises(PaleyError, match="is no name for a new folder"):
        Work(Path(output))


def test_names_that_are_no_names_stand_for_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("", ".", "out/.."):
        assert Work(Path(output), resumable=True).path == tmp_path.with_name(tmp_path.name + ".run")
    assert Work(Path("out"), resumable=True).path == tmp_path / "out.run"


# --- single files -----------------------------------------------------------------------------------------


def test_where_a_file_may_be_written(tmp_path):
    (tmp_path / "old.json").touch()
    check_file(tmp_path / "new.json", "the plan's file", overwrite=False)
    check_file(tmp_path / "old.json", "the plan's file", overwrite=True)
    for name, complaint in (
        (".", "is a folder; give the plan's file"),
        ("no/a.json", "there is no folder .*no; make it first"),
        ("old.json", r"old\.json: exists already; choose another --output, or replace it with --overwrite"),
    ):
        with pytest.raises(PaleyError, match=complaint):
            check_file(tmp_path / name, "the plan's file", overwrite=False)
