"""The console script `paley`.

It stands beside the package: importing anything from there imports torch and transformers first, which takes seconds.
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
    """Runs the command line; Ctrl-C while it is still being imported ends as it does later: one line, exit code 130."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else a shell has it ignored
    if interruptible:
        signal.signal(signal.SIGINT, _stop)
    from paley.cli import app

    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app(prog_name="paley")
    except KeyboardInterrupt:  # beside the verb, which deals with its own
        with contextlib.suppress(OSError):
            os.write(2, _STOPPED)
        sys.exit(128 + signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: nothing is open yet, and numpy's import swallows a KeyboardInterrupt."""
    try:
        os.write(2, _STOPPED)
    finally:  # also where nobody reads it any more
        os._exit(128 + number)
