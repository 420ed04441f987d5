"""One process at a time, and no folder left that was made for nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest

from paley.core.errors import PaleyError
from paley.format.locks import LOCK, locked


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
