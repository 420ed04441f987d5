"""A journal: a file of JSON lines to which a long job appends each result, so that a killed job loses only one.

The first line holds the job's settings, each further line one entry. Only one process at a time can open it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from paley.core.errors import PaleyError
from paley.format.locks import hold

__all__ = ["Journal", "open_journal"]

T = TypeVar("T")


class Journal(Generic[T]):
    """An open journal; `entries` are those of earlier runs, converted by `parse`."""

    def __init__(self, file: IO[bytes], entries: list[T]):
        self.entries, self._file = entries, file

    def append(self, entry: dict[str, Any]) -> None:
        """Writes the entry, plain data without NaN, through to the system."""
        self._file.write(_line(entry))
        self._file.flush()


@contextmanager
def open_journal(
    path: str | Path, settings: dict[str, Any], parse: Callable[[Any], T], *, what: str
) -> Iterator[Journal[T]]:
    """Opens the journal of a job with these settings, or starts a new one; `what` names the job in errors.

    It drops a last line that a kill cut off. parse(plain data) -> an entry; ValueError, LookupError and TypeError
    mean damage. Errors: PaleyError if the file is damaged, of other settings, in use, or not writable. A refused
    file stays as it is.
    """
    path = Path(path)
    try:
        file = path.open("a+b")
    except OSError as error:
        raise PaleyError(f"{path}: cannot be written ({error})") from None
    with file:
        hold(file, path)
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        header = _line(settings)
        try:
            first, *entries = [json.loads(line) for line in whole.splitlines()] or [settings]
            parsed = [parse(entry) for entry in entries]
            if not whole and not header.startswith(text):
                raise ValueError("it does not begin with settings")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise PaleyError(f"{path}: is damaged ({reason}); delete it, or start anew with --overwrite") from None
        if first != json.loads(header):
            raise PaleyError(
                f"{path}: the unfinished {what} there is of another model or other settings; repeat its command "
                "with --resume, or start anew with --overwrite"
            )
        file.truncate(len(whole))
        journal = Journal(file, parsed)
        if not whole:
            journal.append(settings)
        yield journal


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False).encode() + b"\n"
