"""What a long run tells the outside while it works; the command line draws it, libraries may ignore it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["Monitor", "Pace", "duration"]

_FORGET = 0.95  # of the pace so far, with each step: some twenty steps count
_TRUST = 0.03  # share of the whole estimate that counts as observed before anything is


class Monitor:
    """Silent by default; override what you want to see."""

    def expect(self, stages: Mapping[str, float]) -> None:
        """The stages to come, and how many seconds each is estimated to take."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, detail: str = "") -> None:
        """One step of the stage is done; `detail` says which, and what came out."""

    def note(self, text: str) -> None:
        """Something worth a line that stays."""


class Pace(Monitor):
    """The time left: what was estimated, times how much longer the last steps took than estimated.

    Of a stage that nobody estimated, the time left of it alone, by the pace of its own steps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._expected = clock, dict[str, float]()
        self._name, self._total, self._done = "", 0, 0
        self._began = self._last = clock()
        self._taken, self._estimated = 0.0, 0.0  # seconds of the last steps, as they were and as estimated

    def expect(self, stages: Mapping[str, float]) -> None:
        self._expected = dict(stages)
        self._taken = self._estimated = _TRUST * sum(stages.values())

    def stage(self, name: str, total: int) -> None:
        self._expected.pop(self._name, None)
        self._name, self._total, self._done = name, total, 0
        self._began = self._last = self._clock()

    def step(self, detail: str = "") -> None:
        now = self._clock()
        if (expected := self._expected.get(self._name)) is not None and self._total:
            self._taken = _FORGET * self._taken + now - self._last
            self._estimated = _FORGET * self._estimated + expected / self._total
        self._done, self._last = self._done + 1, now

    def left(self) -> float | None:
        """Seconds; None if nothing is known yet."""
        now, steps = self._clock(), self._total - self._done
        if self._name in self._expected and self._estimated:
            rest = sum(self._expected.values()) - self._expected[self._name] * self._done / max(self._total, 1)
            return max(0.0, rest * self._taken / self._estimated - (now - self._last))
        if not self._done:
            return None
        return max(0.0, steps * (self._last - self._began) / self._done - (now - self._last))


def duration(seconds: float) -> str:
    """'75 s', '12 min', '5.2 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
