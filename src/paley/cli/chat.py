"""`paley chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Self

from paley.cli import options
from paley.cli.app import verb
from paley.cli.generate import summary
from paley.cli.process import line, say, stream
from paley.cli.words import spell
from paley.core.errors import PaleyError, nearest_name

if TYPE_CHECKING:
    from paley.pipeline.chat import Chat

__all__ = ["chat_verb"]

_COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: forget the conversation, and tell the model something else before the next",
    "/stats": "tokens, speed and cache of the last answer",
    "/help": "show this",
    "/exit": "end, as Ctrl-D does",
}


@verb("chat")
def chat_verb(
    model: options.ChatModel,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.DrawSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Talk to a model: it remembers the conversation, and reads only what is new.

    Ctrl-C stops an answer, Ctrl-D ends. A line that ends with a backslash goes on in the next. Lines may also
    come from a pipe. Commands: /reset, /system TEXT, /stats, /help, /exit.

    Example: `paley chat llama-w4 --system "You are brief."`
    """
    from paley.pipeline.chat import Chat
    from paley.pipeline.sampling import Sampling

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    chat = Chat(model, system=system, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), device=device)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and earlier ones called back
        say("Ask something; /help lists the commands, Ctrl-D ends.")
    with _CtrlC() as ctrl_c:
        while _turn(chat, ctrl_c):
            pass


class _CtrlC:
    """On a terminal Ctrl-C raises KeyboardInterrupt once after each `arm`, and does nothing else.

    A second press, while the first is reported, would end the program otherwise.
    """

    def __init__(self) -> None:
        self._armed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._pressed) if sys.stdin.isatty() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def arm(self) -> None:
        self._armed = True

    def disarm(self) -> None:
        self._armed = False

    def _pressed(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


def _turn(chat: Chat, ctrl_c: _CtrlC) -> bool:
    """One line of the user, and what it asks for -> whether the conversation goes on."""
    stopped = "Ctrl-D or /exit ends"
    try:
        ctrl_c.arm()
        text = _next()
        stopped = "stopped; what came so far is remembered"
        goes_on = text is not None and _do(chat, text)
        ctrl_c.disarm()
    except KeyboardInterrupt:
        line()
        if not sys.stdin.isatty():
            raise
        say(stopped)
        return True
    return goes_on


def _next() -> str | None:
    """What the user types next; None at the end."""
    mark, lines = ("> " if sys.stdin.isatty() else ""), list[str]()
    while True:
        try:
            lines.append(input(mark if not lines else mark and ". "))
        except EOFError:
            if sys.stdin.isatty():
                line()
            return "\n".join(lines).strip() or None
        except UnicodeDecodeError:
            raise PaleyError("stdin: is not UTF-8 text", remedy="convert it, with iconv") from None
        if not lines[-1].endswith("\\"):
            return "\n".join(lines).strip()
        lines[-1] = lines[-1][:-1]


def _do(chat: Chat, text: str) -> bool:
    """-> whether the conversation goes on."""
    if text.startswith("/"):
        return _command(chat, text)
    if text:
        try:
            chat.say(text, write=stream)
        except PaleyError as error:
            say(f"error: {error.render(lambda part: spell(part, 'chat'))}")
        else:
            line()
    return True


def _command(chat: Chat, text: str) -> bool:
    """-> whether the conversation goes on."""
    name, _, rest = text.partition(" ")
    if name == "/exit":
        return False
    if name in ("/reset", "/system"):
        if name == "/system":
            chat.system = rest.strip() or None
        chat.reset()
        say("forgotten" if chat.system is None else f"forgotten; the model is told: {chat.system}")
    elif name == "/stats":
        say(_stats(chat))
    elif name == "/help":
        for command, what in _COMMANDS.items():
            say(f"{command:8} {what}")
    else:
        say(f"{name}: no such command{nearest_name(name, _COMMANDS) or '; /help lists them'}")
    return True


def _stats(chat: Chat) -> str:
    last = chat.last
    if last is None:
        return "nothing was answered yet"
    reused = f" ({last.reused_tokens} of them were in the cache)" if last.reused_tokens else ""
    limit = "" if chat.model.decoder.limit is None else f" of {chat.model.decoder.limit}"
    return f"{summary(last)}\ncontext: {last.prompt_tokens + last.tokens} tokens{limit}{reused}"
