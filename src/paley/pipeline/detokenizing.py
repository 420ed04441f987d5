"""Tokens become text while they come: never half a character, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from paley.core.errors import PaleyError, Setting

__all__ = ["Detokenizer", "StopFinder"]

_BROKEN = "\ufffd"  # what decoders give for bytes that are no character, or not yet
_PATIENCE = 8  # tokens; a character has at most four bytes, so more are broken for good
_CONTEXT = 8  # tokens before a text that are enough to tell what its first one is


class Detokenizer:
    """Gives each token's text as soon as it is certain.

    A decoder may strip the space of a text's first token and joins the bytes of several tokens. So each text is the
    difference between decoding some tokens before it with and without the new ones.

    before: the tokens that the text goes on from, so that its first space is kept; none for a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._before = list(before[-_CONTEXT:])  # given, and the context of what follows
        self._held: list[int] = []
        self._broken = 0  # tokens since the text ends in half a character

    def add(self, token: int) -> str:
        """-> the text that is certain now, often empty."""
        self._held.append(token)
        text = self._text()
        self._broken = self._broken + 1 if text.endswith(_BROKEN) else 0
        if not text and self.name(token):
            self._held.pop()
        return "" if 0 < self._broken <= _PATIENCE else self._give(text)

    def would_add(self, token: int) -> str:
        """The text that a token would have if it came next, with U+FFFD for half a character."""
        return self._text(token)

    def name(self, token: int) -> str:
        """Of a special token, which has no text; "" of others."""
        shown = cast(
            str, self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        return "" if self._decode([token]) else shown

    def finish(self) -> str:
        """-> the text of all tokens that are held back."""
        return self._give(self._text()) if self._held else ""

    def _text(self, *more: int) -> str:
        whole = self._decode([*self._before, *self._held, *more])
        return whole[len(self._decode(self._before)) :]

    def _give(self, text: str) -> str:
        if text:
            self._before, self._held, self._broken = self._held, [], 0
        return text

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopFinder:
    """Passes text on up to the first stop string, and holds back an end that may become one."""

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise PaleyError(Setting("stop"), ": a stop string is empty", remedy="leave it out")
        self._stops, self._held = tuple(stops), ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """-> the text that is certain not to belong to a stop string; after one nothing more."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(place, -len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """-> what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
