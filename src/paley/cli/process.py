"""The process around a verb: its exit codes, its last words, and the silence of the libraries below."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging
from typer.core import TyperGroup

from paley.core.errors import PaleyError

__all__ = ["Verbs", "how_to_resume", "naming", "peak_memory", "quiet", "say", "shell", "spread_settings", "typed"]

STOPPED = 130  # 128 + SIGINT, as shells have it
_SETTING = re.compile(r"[a-z_][a-z_.]*=")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE}
_NO_SPACE = re.compile(r"os error (28|122)\b")  # the same two, as the errors of safetensors spell them
_ALLOCATION = re.compile(r"DefaultCPUAllocator|can't allocate memory")


class Verbs(TyperGroup):
    """Bad input, and what the machine has not or allows not, end in one line on stderr and exit code 2, Ctrl-C in 130.

    Any other exception is a bug, and keeps its traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, spread_settings(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PaleyError as error:
            message = str(error)
        except KeyboardInterrupt:
            say("stopped")
            raise typer.Exit(STOPPED) from None
        except (MemoryError, OSError, RuntimeError, SafetensorError) as error:
            reason = _machine(error)
            if reason is None:
                raise
            message = reason
        say(f"error: {message}")
        raise typer.Exit(2)


def spread_settings(args: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` -> `--set a=1 --set b=2`: one --set may be followed by several settings."""
    spread: list[str] = []
    in_settings = False
    for arg in args:
        if spread[-1:] != ["--set"]:  # else it is the setting that this --set needs anyway
            if in_settings and _SETTING.match(arg):
                spread.append("--set")
            else:
                in_settings = arg == "--set"
        spread.append(arg)
    return spread


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Errors about settings speak of them as the options that the user typed: setting -> option."""
    try:
        yield
    except PaleyError as error:
        message = str(error)
        for setting, option in options.items():
            message = message.replace(setting, option)
        raise PaleyError(message) from error


def typed(ctx: Any) -> list[str]:
    """The arguments as the user typed them, the verb first."""
    return ctx.find_root().meta[__name__]


def how_to_resume(ctx: Any, kept: Path) -> str:
    """What to say when a verb is stopped: where its finished work is kept, and the command that goes on."""
    if not kept.exists():
        return "stopped; nothing was begun"
    args = typed(ctx)
    command = shell(*args, *([] if "--resume" in args else ["--resume"]))
    return f"stopped; what is finished is kept in {kept}. Go on with:\n  {command}"


def say(text: str) -> None:
    """Lines on stderr, never wrapped: a path or a command in them can be copied."""
    print(text, file=sys.stderr, flush=True)


def shell(*args: str) -> str:
    """The command line that runs `paley` with these arguments."""
    return shlex.join(["paley", *args])


def quiet() -> None:
    """Keeps the bars and log lines of transformers, the Hub client and `datasets` off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when `datasets` is first imported


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far, without an accelerator's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _machine(error: Exception) -> str | None:
    """What ran out on this machine or what it forbids, if that is what the error says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _ALLOCATION.search(str(error)):
        device = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return (
            f"{device} is full ({_first_line(error)}); use fewer or shorter sequences (--set "
            "calibration.sequences=N calibration.seq_len=N, eval --sequences N), or a larger machine"
        )
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    if full or (isinstance(error, SafetensorError) and _NO_SPACE.search(str(error))):
        return f"the disk is full ({_first_line(error)}); make room, then repeat the command with --resume"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or 'this machine'}: {error.strerror}; change that, or choose another place"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
