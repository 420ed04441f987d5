"""Memory that this process has freed and holds nevertheless."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["give_back"]


def give_back() -> None:
    """Returns memory to the system that this process has freed; glibc keeps it in pieces otherwise. Elsewhere nothing.

    After a block of SmolLM2-135M that is .45 of 1.6 GB.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
