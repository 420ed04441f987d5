"""Files that someone else may have written: read strictly, refused by name."""

from __future__ import annotations

import pytest

from paley.core.errors import PaleyError
from paley.core.reading import read_json, read_text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"is not valid JSON \(line 1, column 1"),
        (b'{"a": 1,\n', r"is not valid JSON \(line 2"),
        (b"[" * 10**5, r"is not valid JSON \(too many levels of brackets\)"),
        (b"[1]", "expected a mapping of keys to values, got list"),
        (b"null", "expected a mapping of keys to values, got null"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is given twice"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 7\), expected a plan"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, complaint):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PaleyError, match=rf"a\.json: {complaint}"):
        read_json(tmp_path / "a.json", "plan")


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(PaleyError, match=r"a\.json: is not valid JSON \(Exceeds the limit"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_text, read_json])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(PaleyError, match=r"none: no such plan"):
        read(tmp_path / "none", "plan")
    for path in (tmp_path, tmp_path / "a\0b"):
        with pytest.raises(PaleyError, match="cannot be read as a plan"):
            read(path, "plan")


def test_an_object_comes_back(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}
