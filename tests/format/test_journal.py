"""The journal: what a killed job finished comes back, and nothing else does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from paley.core.errors import PaleyError
from paley.format.journal import open_journal

SETTINGS = {"seed": 0, "levels": [1, 2], "name": "ä"}


def keep(file: Path, *entries: int, settings=SETTINGS) -> list[int]:
    """Appends the entries -> those that were there."""
    with open_journal(file, settings, lambda entry: int(entry["n"]), what="measurement") as journal:
        for n in entries:
            journal.append({"n": n})
        return journal.entries


def test_what_was_appended_comes_back(tmp_path):
    file = tmp_path / "j.jsonl"
    assert keep(file, 1, 2) == []
    assert keep(file, 3) == [1, 2]
    assert keep(file) == [1, 2, 3]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [SETTINGS, {"n": 1}, {"n": 2}, {"n": 3}]


def test_an_entry_is_in_the_file_at_once(tmp_path):
    with open_journal(tmp_path / "j", SETTINGS, dict, what="measurement") as journal:
        journal.append({"n": 1})
        assert (tmp_path / "j").read_bytes().endswith(b'{"n": 1}\n')
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.append({"n": float("nan")})


def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path):
    file = tmp_path / "j.jsonl"
    keep(file, 1, 2)
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        known = keep(file)
        assert known == [1, 2][: max(0, whole[:size].count(b"\n") - 1)]
        keep(file, *[1, 2][len(known) :])
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        b"no json\n", b"\n", b'{"a": 1}\n{"m": 1}\n', b"[]\n3\n", b'{"a": "\xff"}\n', b"[" * 10**5 + b"\n",
        b'{"a": 1}\n{"n": 1}\n\n', b"a novel, one line long",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_stays(tmp_path, text):
    file = tmp_path / "j.jsonl"
    file.write_bytes(text)
    with pytest.raises(PaleyError, match=r"j\.jsonl: is damaged \(.*\); delete it, or start anew with --overwrite"):
        keep(file)
    assert file.read_bytes() == text


def test_other_settings_are_refused_and_the_file_stays(tmp_path):
    file = tmp_path / "j.jsonl"
    keep(file, 1)
    before = file.read_bytes() + b'{"n": 2'
    file.write_bytes(before)
    with pytest.raises(PaleyError, match=r"j\.jsonl: the unfinished measurement there is of another model"):
        keep(file, settings=SETTINGS | {"seed": 1})
    assert file.read_bytes() == before


def test_one_process_at_a_time(tmp_path):
    file = tmp_path / "j.jsonl"
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PaleyError, match=r"j\.jsonl: another run is at work on it"):
            keep(file)
    keep(file)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    with pytest.raises(PaleyError, match="cannot be written"):
        keep(tmp_path)


def test_a_file_system_without_locks_is_named_and_nothing_left(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(PaleyError, match=r"j\.jsonl: .*No locks available.*; choose another --output"):
        keep(tmp_path / "j.jsonl")
    assert not (tmp_path / "j.jsonl").exists()  # else it passes for unfinished work
