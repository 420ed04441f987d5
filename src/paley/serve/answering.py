"""From a checked request to an answer: jobs for the scheduler, and their events as JSON or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from paley.core.errors import PaleyError
from paley.serve.grammar import Grammar
from paley.serve.protocol import MAX_CHOICES, ApiError, Common, CompletionRequest
from paley.serve.scheduler import Busy, Event, Job, Scheduler, Stopped
from paley.serve.shapes import Choice, Shape, usage

__all__ = ["Answering", "check_choices", "check_prompt"]

_PAUSE = 0.02  # seconds: nobody reads faster, and what client and server do for each piece takes time from the model


def check_choices(scheduler: Scheduler, prompts: int, n: int) -> None:
    """Raises for more answers than one request may have, or than ever fit; needs no tokens yet."""
    if not prompts:
        raise ApiError(400, "prompt: is an empty list", param="prompt")
    most, why = min((MAX_CHOICES, ""), (scheduler.capacity, ", which is all that this server holds at once"))
    if prompts * n > most:
        raise ApiError(400, f"prompts times n are {prompts * n}, and can never be more than {most}{why}", param="n")


def check_prompt(scheduler: Scheduler, ids: list[int], wanted: int | None, longest: int | None) -> int:
    """-> the most tokens that an answer to this prompt may have; raises if there is no room.

    wanted: by the client; longest: of prompt and answer together, by the server.
    """
    vocabulary = scheduler.model.decoder.vocabulary
    if not ids:
        raise ApiError(400, "the prompt is empty, and this model has no token to begin with", param="prompt")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ApiError(400, f"tokens of this model are 0 to {vocabulary - 1}", param="prompt")
    limits = [limit for limit in (longest, scheduler.model.decoder.limit) if limit is not None]
    if not limits:
        return 2048 if wanted is None else wanted
    room = min(limits) - len(ids)
    if room < 1 or (wanted or 1) > room:
        asked = "" if wanted is None else f" and {wanted} for the answer"
        raise ApiError(
            400, f"the prompt has {len(ids)} tokens{asked}, and a context holds {min(limits)}; "
            + ("shorten the prompt" if room < 1 else f"set max_tokens to {room} or less, or shorten the prompt"),
            param="messages" if room < 1 else "max_tokens", code="context_length_exceeded",
        )  # fmt: skip
    return room if wanted is None else wanted


@dataclass(eq=False)
class Answering:
    """One request. ended: called with each job when nothing more will come of it; grammar: of each answer."""

    scheduler: Scheduler
    body: Common
    shape: Shape
    prompts: list[list[int]]
    most: list[int]
    chances: int | None
    seed: int
    ended: Callable[[Job], None]
    grammar: Grammar | None = None

    def submit(self) -> None:
        """Queues the jobs; raises ApiError for bad settings, 429 if the queue is full, 503 if nothing works on it."""
        loop, choices = asyncio.get_running_loop(), self.body.n or 1
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: list[Job] = []
        try:
            for prompt, most in zip(self.prompts, self.most, strict=True):
                for choice in range(choices):
                    place = len(self.jobs)
                    self.jobs.append(
                        Job(
                            prompt, self.body.sampling(choice, self.seed), most, self._teller(loop, place),
                            self.body.stops, self.chances, continues=isinstance(self.body, CompletionRequest),
                            constraint=None if self.grammar is None else self.grammar.fresh(),
                        )
                    )  # fmt: skip
        except PaleyError as error:
            raise ApiError(400, str(error)) from None
        if any(not stop for stop in self.body.stops) or len(self.body.stops) > 16:
            raise ApiError(400, "stop: up to 16 texts, and none of them empty", param="stop")
        try:
            self.scheduler.submit(self.jobs)
        except Busy as busy:
            raise ApiError(
                429, str(busy), kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(busy.seconds)}
            ) from None
        except Stopped as stopped:
            raise _server_error(stopped) from None

    def _teller(self, loop: asyncio.AbstractEventLoop, place: int) -> Callable[[Event], None]:
        return lambda event: loop.call_soon_threadsafe(self.events.put_nowait, (place, event)) and None

    async def whole(self, request: Request) -> dict[str, Any] | None:
        """The answer; None if the client went away."""
        choices = [Choice() for _ in self.jobs]
        gone = asyncio.ensure_future(_disconnected(request))
        collecting = asyncio.ensure_future(self._collect(choices))
        try:
            await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return None
            collecting.result()
        finally:
            gone.cancel()
            collecting.cancel()
            self._finish()
        return self.shape.whole(choices, usage(self.jobs, len(self.prompts)))

    async def _collect(self, choices: list[Choice]) -> None:
        async for place, event in self._all(pause=0):
            if event.error is not None:
                raise _server_error(event.error)
            choices[place].text += event.text
            choices[place].drawn += event.drawn
            choices[place].finish = event.finish

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; an error is one as well, and the last. Ends the jobs if the client goes away."""
        opened: set[int] = set()
        try:
            async for place, event in self._all(_PAUSE):
                if event.error is not None:
                    yield _sse(_server_error(event.error).body)
                    return
                if place not in opened and (opening := self.shape.opening(place)) is not None:
                    yield _sse(self._without_counts(opening))
                opened.add(place)
                if event.text or event.finish or self.chances is not None:
                    yield _sse(self._without_counts(self.shape.chunk(place, event)))
            if self.body.wants_usage:
                yield _sse(self.shape.counts(usage(self.jobs, len(self.prompts))))
            yield "data: [DONE]\n\n"
        finally:
            self._finish()

    def _without_counts(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return chunk | {"usage": None} if self.body.wants_usage else chunk

    async def _all(self, pause: float) -> AsyncIterator[tuple[int, Event]]:
        """What there is, as soon as something is; then those of an answer that came within a pause, in seconds."""
        left = len(self.jobs)
        while left:
            came = [await self.events.get()]
            while not self.events.empty():
                came.append(self.events.get_nowait())
            found: dict[tuple[int, bool], Event] = {}
            for place, event in came:
                key = place, event.error is not None
                found[key] = found[key] + event if key in found else event
            for (place, _), event in found.items():
                left -= event.finish is not None or event.error is not None
                yield place, event
            if left:
                await asyncio.sleep(pause)

    def _finish(self) -> None:
        self.scheduler.cancel(self.jobs)  # those that have ended do not mind
        for job in self.jobs:
            self.ended(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _server_error(error: Exception) -> ApiError:
    """What the model could not do; the message of a bug stays in the log."""
    if isinstance(error, PaleyError):
        return ApiError(503 if isinstance(error, Stopped) else 500, str(error), kind="server_error")
    return ApiError(500, f"the model failed ({type(error).__name__}); the server's log has more", kind="server_error")


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
