"""A folder that takes the place of an older one: killed at any step, nothing is lost; one process at a time does it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paley.core.errors import PaleyError

__all__ = ["LOCK", "exchange", "locked", "restore"]

LOCK = "lock"


@contextmanager
def locked(work: Path, output: Path) -> Iterator[None]:
    """Holds the folder `work`, made where there is none, so that one process at a time makes `output`."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / LOCK).open("a")
    except OSError as error:
        raise PaleyError(f"{work}: cannot be written ({error}); choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended = os.fstat(lock.fileno()).st_nlink == 0  # its holder has removed it between the two lines above
        except BlockingIOError:
            ended = True
        if ended:
            raise PaleyError(f"{output}: another run is at work on it; wait for it, or choose another --output")
        yield


def exchange(new: Path, place: Path, aside: Path) -> None:
    """`new` becomes `place`, and what was there goes `aside`; killed between the two, `restore` brings it back."""
    if place.exists():
        place.rename(aside)
    try:
        new.rename(place)
    except OSError:
        restore(place, aside)
        raise


def restore(place: Path, aside: Path) -> None:
    """Undoes half an exchange; does nothing after a whole one, or none."""
    if aside.exists() and not place.exists():
        aside.rename(place)
