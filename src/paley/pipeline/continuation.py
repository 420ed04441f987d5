"""A text that a model continues, token by token: `generate` and `chat` run one, the server many at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from paley.core.errors import PaleyError, Setting
from paley.pipeline.decoder import Context, Decoder
from paley.pipeline.detokenizing import Detokenizer, StopFinder
from paley.pipeline.opening import TextModel
from paley.pipeline.sampling import Sampler, Sampling, log_probabilities

__all__ = ["Chance", "Constraint", "ContextPool", "Continuation", "Drawn", "check_room", "step"]

_PIECE = 256  # tokens of a prompt read at once: Ctrl-C, and other texts, wait no longer


class Chance(NamedTuple):
    """A token that could have been drawn; text: what it would have added, or the name of a special token."""

    token: int
    logprob: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn; logprob, and the likeliest ones, if they were wanted.

    text: what it added; a character of several tokens is the last one's, and a special token has its name. offset: its
    place in the answer, of which a stop string and what follows it are cut off.
    """

    token: int
    text: str = ""
    offset: int = 0
    logprob: float | None = None
    top: tuple[Chance, ...] = ()


class Constraint(Protocol):
    """What an answer must look like, from its first token on."""

    def allowed(self) -> Tensor:
        """-> bool [vocabulary]: the tokens that may come next."""
        ...

    def take(self, token: int) -> bool:
        """The token that was drawn -> whether the text is complete, and nothing may follow."""
        ...


class Continuation:
    """One text. Call `pending`, let a decoder read that in `context`, and `take` the logits, until `finish` is set.

    context: one that has read the beginning of the prompt, but not its last token; else a new one.
    finish: "stop" after a token that ends texts, a stop string or what completes the constraint; "length" after
    max_new_tokens.
    logprobs: how many of the most likely tokens `drawn` tells of beside the one drawn; None: no chances at all.
    continues: whether the text goes on from the prompt's, and keeps its first space; an answer in a chat does not.
    constraint: tokens that it does not allow are never drawn.
    """

    def __init__(
        self, model: TextModel, prompt: Sequence[int], *, sampling: Sampling, max_new_tokens: int,
        stop: Sequence[str] = (), logprobs: int | None = None, context: Context | None = None,
        continues: bool = False, constraint: Constraint | None = None,
    ):  # fmt: skip
        self._sampler, self._stops = Sampler(sampling, prompt), StopFinder(stop)
        self.prompt_tokens, self.ids = len(prompt), list(prompt)
        self.context = context if context is not None else model.decoder.start()
        self.reused_tokens = self.context.length
        self.finish: Literal["stop", "length"] | None = None
        self.drawn: list[Drawn] = []
        self._length = 0  # characters of all tokens drawn
        self.began, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self._ends, self._most, self._logprobs = model.ends, max_new_tokens, logprobs
        self._constraint = constraint
        self._text = Detokenizer(model.tokenizer, prompt if continues else ())

    @property
    def pending(self) -> list[int]:
        """The tokens to read next: a piece of the prompt, or the token drawn last."""
        return self.ids[self.context.length :][:_PIECE]

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is left to read."""
        return self.context.length < self.prompt_tokens

    def take(self, logits: Tensor) -> str:
        """logits [vocabulary] after `pending` -> the text that is certain now, often empty."""
        if self.context.length < len(self.ids):
            return ""
        token, complete = self._draw(logits)
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.ids.append(token)
        chances = None if self._logprobs is None else self._chances(logits, token, self._logprobs)
        ended = complete or token in self._ends
        piece = "" if token in self._ends else self._text.add(token)
        last = ended or len(self.drawn) + 1 >= self._most
        if last:
            piece += self._text.finish()
        self._note(token, piece, chances)
        text = self._stops.add(piece)
        if ended or self._stops.found is not None:
            self.finish = "stop"
        elif last:
            self.finish = "length"
        return text + self._stops.finish() if self.finish else text

    def _chances(self, logits: Tensor, token: int, most: int) -> tuple[float, list[Chance]]:
        """-> the token's log-probability, and the likeliest tokens, with the text that each would add."""
        own, others = log_probabilities(logits, token, most)
        return own, [Chance(*each, self._text.would_add(each[0]) or self._text.name(each[0])) for each in others]

    def _note(self, token: int, piece: str, chances: tuple[float, list[Chance]] | None) -> None:
        text, offset = piece or self._text.name(token), self._length
        self._length += len(piece)
        if chances is None:
            self.drawn.append(Drawn(token, text, offset))
            return
        own, others = chances
        top = tuple(each._replace(text=text) if each.token == token else each for each in others)
        self.drawn.append(Drawn(token, text, offset, own, top))

    def _draw(self, logits: Tensor) -> tuple[int, bool]:
        """-> a token, and whether the constraint lets nothing follow it."""
        if self._constraint is None:
            return self._sampler.choose(logits), False
        token = self._sampler.choose(logits.masked_fill(~self._constraint.allowed(), -torch.inf))
        return token, self._constraint.take(token)

    def rest(self) -> str:
        """The text that was held back, if the text is left before it is finished."""
        if self._stops.found is not None:
            return ""
        text = self._stops.add(self._text.finish())
        return text + self._stops.finish()

    @property
    def read_ids(self) -> list[int]:
        """What the context has read."""
        return self.ids[: self.context.length]


def step(decoder: Decoder, texts: Sequence[Continuation]) -> list[str]:
    """One round: each text reads what is pending -> the new text of each."""
    logits = decoder.read([(text.context, text.pending) for text in texts])
    return [text.take(row) for text, row in zip(texts, logits, strict=True)]


def check_room(decoder: Decoder, prompt_tokens: int, new: int) -> None:
    """Raises if prompt and continuation are longer than what the model was made to read."""
    limit = decoder.limit
    if limit is not None and prompt_tokens + new > limit:
        raise PaleyError(
            Setting("max_new_tokens", new),
            f": with a prompt of {prompt_tokens} tokens that is more than the {limit} tokens that this model reads "
            "(max_position_embeddings)",
            remedy=("use ", Setting("max_new_tokens", limit - prompt_tokens))
            if prompt_tokens < limit
            else "use a shorter prompt",
        )


class ContextPool:
    """Contexts of earlier texts: a text that goes on from one, as a chat does, is not read from its beginning.

    At most `most` are kept, and the one that was used longest ago goes first.
    """

    def __init__(self, decoder: Decoder, most: int):
        self._decoder, self._most = decoder, most
        self._kept: list[tuple[Context, list[int]]] = []

    def take(self, ids: Sequence[int]) -> Context:
        """A context that has read the beginning of `ids`, and not the last token: often an empty one.

        A context that shares less than half of what it holds is left to the text that it belongs to.
        """
        best, shared = None, 0
        for entry in self._kept:
            common = min(_common(entry[1], ids), len(ids) - 1)
            if common > shared and 2 * common >= len(entry[1]):
                best, shared = entry, common
        if best is not None:
            self._kept.remove(best)
            try:
                best[0].truncate(shared)
            except PaleyError:  # a window of it has moved on
                best[0].close()
            else:
                return best[0]
        return self._decoder.start()

    def put(self, context: Context, ids: list[int]) -> None:
        """Keeps a context that has read `ids`, if these are any."""
        if not ids:
            context.close()
            return
        self._kept.append((context, ids))
        while len(self._kept) > self._most:
            self._kept.pop(0)[0].close()

    @property
    def nbytes(self) -> int:
        """Bytes of the caches kept."""
        return sum(context.nbytes for context, _ in self._kept)

    def close(self) -> None:
        """Frees all."""
        for context, _ in self._kept:
            context.close()
        self._kept.clear()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
