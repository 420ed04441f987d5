"""A folder in another's place: nothing is lost at any step, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest

from paley.core.errors import PaleyError
from paley.format.folders import LOCK, exchange, locked, restore


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


def test_one_process_at_a_time(tmp_path):
    work = tmp_path / "a" / "work"
    refused = pytest.raises(PaleyError, match="out: another run is at work on it")
    with locked(work, Path("out")), refused, locked(work, Path("out")):
        pass
    with locked(work, Path("out")):
        pass


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(file: IO[str], how: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(PaleyError, match="another run is at work"), locked(tmp_path, Path("out")):
        pass


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file: IO[str], how: int) -> None:
        if not calls:
            (tmp_path / "work" / LOCK).unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(PaleyError, match="another run is at work")
    with locked(tmp_path / "work", Path("out")), refused, locked(tmp_path / "work", Path("out")):
        pass
    assert len(calls) == 3


def test_a_folder_that_its_holder_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def late(self: Path, *args, **kwargs) -> None:
        mkdir(self, *args, **kwargs)
        if not calls:
            self.rmdir()
        calls.append(self)

    monkeypatch.setattr(Path, "mkdir", late)
    with locked(tmp_path / "work", Path("out")):
        assert (tmp_path / "work" / LOCK).exists()
    assert len(calls) == 2


def test_a_lock_that_another_run_has_made_since_is_left_to_it(tmp_path):
    work = tmp_path / "work"
    with locked(work, Path("out")):
        (work / LOCK).unlink()  # as a run directory does that is removed
        work.rmdir()
        other = locked(work, Path("out"))
        other.__enter__()
    assert (work / LOCK).exists()
    other.__exit__(None, None, None)
    assert not work.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def flock(file: IO[str], how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(PaleyError, match=rf"out: .*lock.*{os.strerror(code)}.*; choose another --output")
    with refused, locked(tmp_path / "a" / "work", Path("out")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_nothing_go(tmp_path):
    work = tmp_path / "x" / "y" / ".z.tmp"
    with locked(work, Path("z")):
        assert work.is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(work, Path("z")):
        (work.parent / "z").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["x", "x/y", "x/y/z"]
    with locked(work, Path("z")):
        (work / "unfinished").touch()
    assert sorted(path.name for path in work.iterdir()) == [LOCK, "unfinished"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(PaleyError, match=r"file/work: cannot be written .*; choose another --output")
    with refused, locked(tmp_path / "file" / "work", Path("out")):
        pass
