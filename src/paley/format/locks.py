"""Locks on files and folders: one process at a time makes an output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from paley.core.errors import PaleyError

__all__ = ["LOCK", "hold", "locked"]

LOCK = "lock"


@contextmanager
def locked(work: Path, output: Path) -> Iterator[None]:
    """Makes the folder `work` if there is none, and locks it, so that one process at a time makes `output`.

    At the end it deletes `work` if only the lock is left in it, and the folders above that it made and that are empty.
    """
    new_parents = [folder for folder in work.parents if not os.path.exists(folder)]
    try:
        with _lock(work, output) as lock:
            try:
                yield
            finally:
                with suppress(OSError):
                    ours = os.fstat(lock.fileno()).st_nlink > 0  # else `work` was removed, and may be another run's
                    if ours and os.listdir(work) == [LOCK]:
                        (work / LOCK).unlink()
    finally:
        for folder in (work, *new_parents):
            with suppress(OSError):  # it holds something, or is gone already
                folder.rmdir()


def _lock(work: Path, output: Path) -> IO[str]:
    """The lock file of `work`, held. A run that ends may remove both meanwhile: then once more."""
    for again in (True, False):
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = (work / LOCK).open("a")
        except OSError as error:
            if again and isinstance(error, FileNotFoundError):
                continue
            raise PaleyError(f"{work}: cannot be written ({error}); choose another --output") from error
        try:
            hold(lock, output)
            if os.fstat(lock.fileno()).st_nlink:
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()
    raise _busy(output)


def hold(file: IO[Any], output: Path) -> None:
    """Locks an open file until it is closed. PaleyError if another process has it, or the file system has no locks.

    In the second case an empty file is deleted: it was made for the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(output) from None
    except OSError as error:
        with suppress(OSError):
            if not os.fstat(file.fileno()).st_size:
                os.unlink(file.name)
        raise PaleyError(
            f"{output}: its file system does not lock files, so that two runs could mix ({error.strerror or error}); "
            "choose another --output"
        ) from error


def _busy(output: Path) -> PaleyError:
    return PaleyError(f"{output}: another run is at work on it; wait for it, or choose another --output")
