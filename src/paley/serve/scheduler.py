"""Continuous batching: one thread lets a decoder read the next token of all running texts in each round.

Requests come and go between rounds. A prompt is read in pieces, so that running answers wait for one piece at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from paley.core.errors import PaleyError
from paley.pipeline.continuation import Constraint, ContextPool, Continuation, Drawn
from paley.pipeline.opening import TextModel
from paley.pipeline.sampling import Sampling

__all__ = ["Busy", "Event", "Job", "Scheduler", "Stopped"]

_LOG = logging.getLogger(__name__)
_PROMPT_TOKENS = 256  # of all prompts together in one round, or one piece


class Busy(Exception):  # noqa: N818  not an error of anybody
    """No room in the queue; seconds: when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Stopped(PaleyError):  # noqa: N818  as Busy
    """The scheduler works no more: the server is stopping, or its thread has failed."""


@dataclass(frozen=True)
class Event:
    """New text and tokens of a job; finish or error: the last event."""

    text: str = ""
    drawn: tuple[Drawn, ...] = ()
    finish: Literal["stop", "length"] | None = None
    error: Exception | None = None

    def __add__(self, later: Event) -> Event:
        return replace(later, text=self.text + later.text, drawn=self.drawn + later.drawn)


@dataclass(eq=False)
class Job:
    """One answer; `tell` gets its events, in the scheduler's thread. Times are of time.monotonic."""

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    tell: Callable[[Event], None]
    stop: Sequence[str] = ()
    logprobs: int | None = None
    submitted: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    cached_tokens: int = 0
    made_tokens: int = 0
    cancelled: bool = False
    continues: bool = False
    constraint: Constraint | None = None


class Scheduler:
    """At most `slots` jobs run at once, and `waiting` more wait; contexts of finished texts are kept for the next."""

    def __init__(self, model: TextModel, *, slots: int, waiting: int):
        self.model, self.slots, self.waiting = model, slots, waiting
        self._pool = ContextPool(model.decoder, slots)
        self._queue: deque[Job] = deque()
        self._entering: list[Job] = []  # from the queue, not yet running
        self._running: list[tuple[Job, Continuation]] = []
        self._changed = threading.Condition()
        self._stopping, self._failed = False, False
        self._seconds = 1.0  # that an answer takes, as a moving average
        self.kv_cache_bytes = 0
        self._thread = threading.Thread(target=self._work, name="paley decoder", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current round; jobs that are left get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """(jobs that run, jobs that wait)"""
        with self._changed:
            return len(self._running) + len(self._entering), len(self._queue)

    @property
    def capacity(self) -> int:
        """How many jobs can run and wait together."""
        return self.slots + self.waiting

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs, or raises Busy or Stopped and queues none.

        A job needs a slot or a place in the queue; more than `capacity` at once never have it.
        """
        with self._changed:
            if self._failed:
                raise Stopped("the model's thread has ended; the server's log has more")
            if self._stopping:
                raise Stopped("the server is stopping")
            ahead = len(self._running) + len(self._entering) + len(self._queue)
            if ahead + len(jobs) > self.capacity:
                raise Busy(max(1, min(60, round(self._seconds * max(1, len(self._queue)) / self.slots))))
            self._queue.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; what they read is kept for others."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def _work(self) -> None:
        try:
            while self._admit():
                self._round()
        except BaseException as error:  # a bug, which must not leave clients waiting
            _LOG.exception("the decoder's thread ended")
            self._failed = True
            self._fail_all(error if isinstance(error, Exception) else RuntimeError(str(error)))
            raise
        self._fail_all(Stopped("the server is stopping"))

    def _admit(self) -> bool:
        """Waits for work, drops what was cancelled, fills the slots -> False at the end."""
        with self._changed:
            while not (self._stopping or self._queue or self._running):
                self._changed.wait()
            self._queue = deque(job for job in self._queue if not job.cancelled)
            free = min(self.slots - len(self._running), len(self._queue))
            self._entering = [self._queue.popleft() for _ in range(free)]
        for job, text in [entry for entry in self._running if entry[0].cancelled]:
            self._end(job, text)
        for job in list(self._entering):
            context = None
            try:
                context = self._pool.take(job.prompt)
                text = Continuation(
                    self.model, job.prompt, sampling=job.sampling, max_new_tokens=job.max_new_tokens, stop=job.stop,
                    logprobs=job.logprobs, context=context, continues=job.continues, constraint=job.constraint,
                )  # fmt: skip
            except Exception as error:
                if context is not None:
                    context.close()
                with self._changed:
                    self._entering.remove(job)
                _tell(job, Event(error=error))
                continue
            job.cached_tokens = text.reused_tokens
            with self._changed:
                self._entering.remove(job)
                self._running.append((job, text))
        return not self._stopping

    def _round(self) -> None:
        """One read for all texts that have their turn."""
        turn = self._turn()
        if not turn:
            return
        try:
            logits = self.model.decoder.read([(text.context, text.pending) for _, text in turn])
        except Exception as error:  # no context has changed: each alone tells whose fault it is
            if len(turn) == 1:
                self._end(*turn[0], error)
                return
            for entry in turn:
                self._read_alone(*entry)
        else:
            for (job, text), row in zip(turn, logits, strict=True):
                self._take(job, text, row)
        self.kv_cache_bytes = self._pool.nbytes + sum(text.context.nbytes for _, text in self._running)

    def _turn(self) -> list[tuple[Job, Continuation]]:
        """All texts past their prompts, and prompts for a number of tokens, the oldest first."""
        turn, tokens = [], 0
        for entry in self._running:
            text = entry[1]
            if text.reading:
                count = len(text.pending)
                if tokens and tokens + count > _PROMPT_TOKENS:
                    continue
                tokens += count
            turn.append(entry)
        return turn

    def _read_alone(self, job: Job, text: Continuation) -> None:
        try:
            (row,) = self.model.decoder.read([(text.context, text.pending)])
        except Exception as error:
            self._end(job, text, error)
        else:
            self._take(job, text, row)

    def _take(self, job: Job, text: Continuation, row: object) -> None:
        before = len(text.drawn)
        try:
            piece = text.take(row)  # type: ignore[arg-type]
        except Exception as error:
            self._end(job, text, error)
            return
        if len(text.drawn) == before:
            return
        job.last = time.monotonic()
        job.first = job.first or job.last
        job.made_tokens = len(text.drawn)
        if text.finish is not None:
            self._end(job, text)
        _tell(job, Event(piece, tuple(text.drawn[before:]), text.finish))

    def _end(self, job: Job, text: Continuation, error: Exception | None = None) -> None:
        """Frees the slot; the context is kept for a text that goes on, unless something went wrong with it."""
        self._running.remove((job, text))
        if error is not None:
            text.context.close()
            _tell(job, Event(error=error))
            return
        self._pool.put(text.context, text.read_ids)
        if not job.cancelled:  # it tells nothing of how long answers take
            self._seconds += 0.1 * (time.monotonic() - job.submitted - self._seconds)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            self._stopping = True
            left = [*(job for job, _ in self._running), *self._entering, *self._queue]
            self._queue.clear()
            self._entering.clear()
        for job in left:
            _tell(job, Event(error=error))
        for _, text in self._running:
            text.context.close()
        self._running.clear()
        self._pool.close()


def _tell(job: Job, event: Event) -> None:
    try:
        job.tell(event)
    except RuntimeError:  # the event loop has ended, and nobody listens
        _LOG.debug("an event came too late")
