"""The JSON of answers, whole and in chunks, as OpenAI's protocol has it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paley.pipeline.continuation import Chance, Drawn
from paley.serve.scheduler import Event, Job

__all__ = ["ChatShape", "Choice", "CompletionShape", "Shape", "usage"]


@dataclass
class Choice:
    """What an answer consists of so far."""

    text: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    finish: str | None = None


def usage(jobs: Sequence[Job], prompts: int) -> dict[str, Any]:
    """prompts: how many different ones there are; each is counted once, whatever n is."""
    each = len(jobs) // prompts
    prompt, made = sum(len(job.prompt) for job in jobs[::each]), sum(job.made_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs[::each])},
    }


class Shape:
    """One answer's envelope; the two kinds below fill it."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, chances: int | None):
        self._model, self._chances = model, chances
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, choices: Sequence[Choice], counts: dict[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        made = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return self._envelope(self.whole_object, made) | {"usage": counts}

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before all others of a choice."""
        return None

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """One event of a choice."""
        raise NotImplementedError

    def counts(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, if the counts are wanted."""
        return self._envelope(self.chunk_object, []) | {"usage": counts}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices,
        }  # fmt: skip

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        delta = {"content": event.text} if event.text or event.finish is None else {}
        return self._delta(index, delta, self._logprobs(event.drawn), event.finish)

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._envelope(self.chunk_object, [choice])

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.drawn)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if self._chances is None:
            return None
        content = [_entry(d) | {"top_logprobs": [_entry(each) for each in d.top]} for d in drawn]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        part = Choice(event.text, list(event.drawn), event.finish)
        return self._envelope(self.chunk_object, [self._choice(index, part)])

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.drawn)
        return {"text": choice.text, "index": index, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if self._chances is None:
            return None
        return {
            "tokens": [d.text for d in drawn],
            "token_logprobs": [d.logprob for d in drawn],
            "top_logprobs": [_likeliest(d) for d in drawn],
            "text_offset": [d.offset for d in drawn],
        }


def _entry(token: Drawn | Chance) -> dict[str, Any]:
    text = token.text
    return {"token": text, "logprob": token.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _likeliest(drawn: Drawn) -> dict[str, float]:
    """By text, as the protocol has it: of tokens with the same text the likelier one, which comes first."""
    found: dict[str, float] = {}
    for each in drawn.top:
        found.setdefault(each.text, each.logprob)
    return found
