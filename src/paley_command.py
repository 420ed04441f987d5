"""The console script `paley`.

It stands beside the package, so that Ctrl-C is quiet from the first import on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_STOPPED = b"stopped\n"


def main() -> None:
    """Runs the command line; Ctrl-C during the imports, too, ends in one line and exit code 130."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else a shell has it ignored
    if interruptible:
        signal.signal(signal.SIGINT, _stop)
    # Threads of torch that wait keep cores busy, which the kernels' threads need. libgomp reads it when it starts.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from paley.cli import app

    try:
        app(prog_name="paley", obj=_interrupt if interruptible else None)
    except KeyboardInterrupt:  # beside the verb, which deals with its own
        with contextlib.suppress(OSError):
            os.write(2, _STOPPED)
        sys.exit(128 + signal.SIGINT)


def _interrupt() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt; a verb calls this when its libraries are imported."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: nothing is open yet, and numpy's import swallows a KeyboardInterrupt."""
    try:
        os.write(2, _STOPPED)
    finally:  # also where nobody reads it any more
        os._exit(128 + number)
