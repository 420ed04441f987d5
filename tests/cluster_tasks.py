"""Tasks for the workers of a pool, in a file that they can import."""

from __future__ import annotations

import os
import time
from pathlib import Path

from paley.core.errors import PaleyError


def slow_square(item: tuple[int, str]) -> tuple[int, int]:
    """Says who is at work, and takes its time."""
    number, folder = item
    (Path(folder) / f"{number}-{os.getpid()}").write_text("")
    time.sleep(1.0 if number % 2 else 0.1)
    return number, number * number


def refuse(number: int) -> int:
    raise PaleyError(f"layer {number}: no", remedy="leave it")


def process_of(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()
