"""Files that are either whole or absent: a temporary name, fsync, then an atomic rename."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from paley.core.errors import PaleyError

__all__ = ["Chunk", "disk", "publish", "write_atomic", "write_synced", "write_whole"]

Chunk = bytes | memoryview

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Writes the file whole or not at all; text as UTF-8. PaleyError where the disk refuses."""
    chunk = data.encode() if isinstance(data, str) else data
    write_whole(Path(path), [chunk], len(chunk))


def write_whole(path: Path, chunks: Iterable[Chunk], needed: int) -> None:
    """Writes the chunks, `needed` bytes in all, under a temporary name, and renames that to `path`.

    The name is this call's own: of two that write one file at a time, the last leaves it whole.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_synced(temporary, chunks, needed, meant=path)
    publish([(temporary, path)])


def write_synced(path: Path, chunks: Iterable[Chunk], needed: int, *, meant: Path | None = None) -> None:
    """Writes the chunks, `needed` bytes in all, through to the disk; a failure leaves no file behind.

    meant: the file that errors speak of, where `path` is only its temporary name.
    """
    try:
        with disk(meant or path, needed), path.open("wb") as file:
            for chunk in chunks:
                _write(file, chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):  # what went wrong first is what to say
            path.unlink()
        raise


def publish(moves: Sequence[tuple[Path, Path]]) -> None:
    """Renames files of one folder, in this order, and syncs it; a failure removes those not yet renamed."""
    try:
        for before, after in moves:
            with disk(after):
                os.replace(before, after)
    finally:
        for before, _ in moves:
            with suppress(OSError):  # as a rule it is gone; else what went wrong first is what to say
                before.unlink()
    if moves and os.name == "posix":  # elsewhere a folder cannot be opened
        folder = moves[0][1].parent
        with disk(folder):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _write(file: BinaryIO, chunk: Chunk) -> None:
    file.write(chunk)


@contextmanager
def disk(path: Path, needed: int = 0) -> Iterator[None]:
    """What the system says about writing `path`, as PaleyError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise PaleyError(f"{path}: cannot be written: {error.strerror or error}") from error
        free = shutil.disk_usage(path.parent).free
        raise PaleyError(
            f"{path.parent}: the disk is full, or your share of it: {path.name} needs {needed:,} bytes, "
            f"{free:,} are free now; make room there, or write to another folder"
        ) from error
