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

__all__ = ["Chunk", "disk", "publish", "sync_folder", "write_atomic", "write_synced", "write_whole"]

Chunk = bytes | memoryview

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Writes the whole file or nothing; text as UTF-8. Errors: PaleyError if the file cannot be written."""
    chunk = data.encode() if isinstance(data, str) else data
    write_whole(Path(path), [chunk], len(chunk))


def write_whole(path: Path, chunks: Iterable[Chunk], needed: int) -> None:
    """Writes the chunks, `needed` bytes in all, under a temporary name, and renames that to `path`.

    The temporary name is unique. If two calls write one file at the same time, the last one wins with a whole file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_synced(temporary, chunks, needed, meant=path)
    publish([(temporary, path)])


def write_synced(path: Path, chunks: Iterable[Chunk], needed: int, *, meant: Path | None = None) -> None:
    """Writes the chunks, `needed` bytes in all, through to the disk; a failure leaves no file behind.

    meant: the file that errors name, if `path` is only its temporary name.
    """
    try:
        with disk(meant or path, needed), path.open("wb") as file:
            for chunk in chunks:
                _write(file, chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
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
            with suppress(OSError):  # usually it is gone; otherwise the first error is the one to report
                before.unlink()
    if moves:
        sync_folder(moves[0][1].parent)


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder's files through to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
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
    """Turns an error of the system while writing `path` into a PaleyError; needed: bytes, for the message."""
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
