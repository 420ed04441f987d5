"""A folder in another's place: nothing is lost at any step, and one process at a time."""

from __future__ import annotations

import fcntl
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
    restore(place, aside)  # of a whole exchange
    assert (place / "name").read_text() == "new"


def test_half_an_exchange_is_undone(folders):
    new, place, aside = folders
    place.rename(aside)
    restore(place, aside)
    assert (place / "name").read_text() == "place"
    with pytest.raises(FileNotFoundError):
        exchange(new / "missing", place, aside)
    assert (place / "name").read_text() == "place"


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


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(PaleyError, match=r"file/work: cannot be written .*; choose another --output")
    with refused, locked(tmp_path / "file" / "work", Path("out")):
        pass
