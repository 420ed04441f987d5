"""A folder that takes the place of an older one: killed at any step, nothing is lost; one process at a time does it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from paley.core.errors import PaleyError
from paley.core.reading import read_json

__all__ = ["LOCK", "RESULTS", "check_free", "exchange", "hold", "locked", "restore", "taken"]

LOCK = "lock"
RESULTS = "results.json"  # its key "run" tells a folder that Paley made, which --overwrite may replace


def taken(output: Path) -> PaleyError:
    """What is said where a file or folder is in the way."""
    return PaleyError(f"{output}: exists already; choose another --output, or replace it with --overwrite")


def check_free(output: Path, *, overwrite: bool) -> None:
    """Raises where a folder may not go to `output`: with `overwrite`, onto what Paley did not make."""
    place = output.resolve()
    if not place.exists():
        return
    if not overwrite:
        raise taken(output)
    if not _is_ours(place) and not (place.is_dir() and not any(place.iterdir())):
        raise PaleyError(f"{output}: was not made by Paley, so --overwrite does not delete it; move it away yourself")


def _is_ours(folder: Path) -> bool:
    try:
        return "run" in read_json(folder / RESULTS)
    except PaleyError:
        return False


@contextmanager
def locked(work: Path, output: Path) -> Iterator[None]:
    """Holds the folder `work`, made where there is none, so that one process at a time makes `output`.

    Afterwards `work` goes where nothing but the lock is in it, and so do the folders above that were made for nothing.
    """
    made = [folder for folder in work.parents if not os.path.exists(folder)]
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
        for folder in (work, *made):
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


def hold(file: IO[str], output: Path) -> None:
    """Locks an open file until it is closed. PaleyError where another process has it, or the file system has no locks.

    In the second case a file that is empty is removed: it was made for the lock.
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


def exchange(new: Path, place: Path, aside: Path) -> None:
    """`new` becomes `place`, and what was there goes `aside`; killed between the two, `restore` brings it back.

    PaleyError where the system refuses, with everything where it was.
    """
    restore(new, place, aside)
    try:
        if place.exists():
            place.rename(aside)
        new.rename(place)
    except OSError as error:
        restore(new, place, aside)
        why = error.strerror or error
        raise PaleyError(f"{place}: cannot be written: {why}; clear the place, or choose another --output") from error


def restore(new: Path, place: Path, aside: Path) -> None:
    """Undoes half an exchange; does nothing after a whole one, or none.

    PaleyError where something else has come to `place` meanwhile: `aside` is then the only copy of what was there.
    """
    if not aside.exists():
        return
    if not place.exists():
        try:
            aside.rename(place)
        except OSError as error:
            why = error.strerror or error
            raise PaleyError(f"{place}: cannot be put back ({why}); move {aside} there yourself") from error
    elif new.exists():  # it is gone once the exchange is whole
        raise PaleyError(
            f"{place}: exists already, while {aside} has what a stopped run was to replace; move one of the two away"
        )
