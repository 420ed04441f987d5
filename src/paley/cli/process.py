"""The process around a verb: its exit codes, its last words, and the silence of the libraries below."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from paley.core.errors import PaleyError

__all__ = [
    "STOPPED", "ReadingVerb", "UsageError", "Verb", "Verbs", "how_to_resume", "line", "peak_memory", "say", "shell",
    "spread_settings", "stream", "typed",
]  # fmt: skip

STOPPED = 130  # 128 + SIGINT, as shells have it
_SETTING = re.compile(r"[a-z_][a-z_.]*=")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE}
_CONTROL = re.compile(r"[^\n\t -~\u00a0-\U0010ffff]")
_NO_SPACE = re.compile(r"os error (28|122)\b")  # the same two, as the errors of safetensors spell them
UsageError: Any = typer.BadParameter.__mro__[1]  # click's, wherever this typer keeps its click
_ALLOCATION = re.compile(r"DefaultCPUAllocator|can't allocate memory")


class Verbs(TyperGroup):
    """Bad input, and what the machine has not or allows not, end in one line on stderr and exit code 2, Ctrl-C in 130.

    Any other exception is a bug, and keeps its traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[__name__] = list(args)
        try:
            return super().parse_args(ctx, spread_settings(args))
        except UsageError as error:
            if not args:  # which shows the help
                raise
            raise _misused(error) from None

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer would import pydantic to find that None is no boolean
        return option

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PaleyError as error:
            from paley.cli.words import spell

            message = error.render(lambda part: spell(part, ctx.invoked_subcommand))
        except UsageError as error:
            raise _misused(error) from None
        except KeyboardInterrupt:
            say("stopped")
            raise typer.Exit(STOPPED) from None
        except Exception as error:
            reason = _machine(error)
            if reason is None:
                raise
            message = reason
        say(f"error: {message}")
        raise typer.Exit(2)


class Verb(TyperCommand):
    """Imports the libraries when the options were understood: until then nobody waits for them."""

    def invoke(self, ctx: Any) -> Any:
        self.prepare(ctx)
        if ctx.obj is not None:  # the console script's: Ctrl-C interrupts from now on
            ctx.obj()
        return super().invoke(ctx)

    def prepare(self, ctx: Any) -> None:
        """Imports what the verb needs."""
        import paley.pipeline.run  # noqa: F401

        _quiet()


class ReadingVerb(Verb):
    """Reads a folder's files; only beside an original (`against`) are there models, and transformers."""

    def prepare(self, ctx: Any) -> None:
        if ctx.params.get("against") is not None:
            super().prepare(ctx)
        else:
            import paley.kernels  # noqa: F401  torch, and what rounds fast


def _misused(error: Any) -> typer.Exit:
    """Says in one line what is wrong with the arguments; typer would import much of rich to draw a box around it."""
    verb = error.ctx.command_path.split()[1:] if error.ctx is not None else ()
    say(f"error: {error.format_message().rstrip('.')}; see `{shell(*verb, '--help')}`")
    return typer.Exit(2)


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


def line(text: str = "") -> None:
    """A line of stdout, never wrapped: paths and commands in it can be copied."""
    print(text)


def stream(text: str) -> None:
    """A piece of a model's text on stdout; on a terminal without the control characters that would steer it."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\ufffd", text)
    print(text, end="", flush=True)


def say(text: str) -> None:
    """Lines on stderr, never wrapped: a path or a command in them can be copied."""
    print(text, file=sys.stderr, flush=True)


def shell(*args: str) -> str:
    """The command line that runs `paley` with these arguments."""
    return shlex.join(["paley", *args])


def _quiet() -> None:
    """Keeps the bars and log lines of transformers, the Hub client and `datasets` off the terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

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
    on_gpu = isinstance(error, _loaded("torch", "OutOfMemoryError"))
    if on_gpu or isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ALLOCATION.search(str(error))):
        where = "the GPU's memory" if on_gpu else "memory"
        return (
            f"{where} is full ({_first_line(error)}); use fewer or shorter "
            "sequences (--set calibration.sequences=N calibration.seq_len=N, eval --sequences N), or a larger machine"
        )
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    if full or (isinstance(error, _loaded("safetensors", "SafetensorError")) and _NO_SPACE.search(str(error))):
        return f"the disk is full ({_first_line(error)}); make room, then repeat the command with --resume"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or 'this machine'}: {error.strerror}; change that, or choose another place"
    return None


def _loaded(module: str, name: str) -> type | tuple[()]:
    """An exception's class, or no class if its module was never imported: then nothing raised it."""
    return getattr(sys.modules.get(module), name, ())


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
