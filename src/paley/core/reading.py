"""Reads text and JSON files from any source: strictly, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paley.core.errors import PaleyError

__all__ = ["read_json", "read_text"]


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of the file, or a PaleyError with the reason; `what` names the kind of file in it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PaleyError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise PaleyError(f"{path}: is not UTF-8 text (byte {error.start}), expected a {what}") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a NUL in the name
        raise PaleyError(f"{path}: cannot be read as a {what} ({error})") from None


def read_json(path: Path, what: str = "JSON file") -> dict[str, Any]:
    """The JSON object in the file. PaleyError if there is none, or if a key is given twice."""
    text = read_text(path, what)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise PaleyError(f"{path}: is not valid JSON ({reason})") from None
    except RecursionError:
        raise PaleyError(f"{path}: is not valid JSON (too many levels of brackets)") from None
    except PaleyError as error:
        raise PaleyError(f"{path}: {error}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise PaleyError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        got = "null" if data is None else type(data).__name__
        raise PaleyError(f"{path}: expected a mapping of keys to values, got {got}")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json.loads that refuses a key given twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise PaleyError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return data
