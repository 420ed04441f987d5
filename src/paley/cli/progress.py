"""Progress on stderr: a live display on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from paley.cli.display import size
from paley.cli.process import peak_memory, say
from paley.pipeline import Monitor
from paley.pipeline.monitor import Pace

__all__ = ["LineMonitor", "counting", "minutes", "watching"]

_EVERY = 10.0  # seconds between lines where there is no terminal


@contextmanager
def watching() -> Iterator[Monitor]:
    """A monitor that draws on stderr until the block ends; what libraries print meanwhile goes there as well.

    stdout is for results: Ray, for one, tells there of workers that died.
    """
    with redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield LineMonitor()
            return
        monitor = _LiveMonitor(Console(stderr=True))
        with monitor.display:
            yield monitor
            monitor.display.close_stage()


@contextmanager
def counting(stage: str) -> Iterator[Callable[[int, str], None]]:
    """A function (how many there are, name of the one that is done), whose first call begins the stage."""
    seen = False
    with watching() as monitor:

        def done(total: int, name: str) -> None:
            nonlocal seen
            if not seen:
                monitor.stage(stage, total)
            seen = True
            monitor.step(name)

        yield done


class LineMonitor(Pace):
    """A line when a stage begins, then at most one every ten seconds, with the time left."""

    def __init__(self, write: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic):
        super().__init__(clock)
        self._write, self._start = write, clock()
        self._said = 0.0

    def stage(self, name: str, total: int) -> None:
        super().stage(name, total)
        self._line(name)

    def step(self, detail: str = "") -> None:
        super().step(detail)
        if self._clock() - self._said >= _EVERY:
            left = "" if (seconds := self.left()) is None else f", {minutes(seconds)} left"
            self._line(f"{self._name} {self._done}/{self._total}{left}  {detail}".rstrip())

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._said = self._clock()
        self._write(f"{self._said - self._start:6.0f} s  {text}")


class _Clock(ProgressColumn):
    """Time spent on a finished stage; steps of one at work."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.finished:
            return Text(minutes(task.elapsed), "progress.elapsed")
        return Text(f"{task.completed:.0f}/{task.total:.0f}", "progress.remaining")


class _Display(Progress):
    """One line a stage; below, the time left, the peak memory, and what the last step said."""

    def __init__(self, console: Console, pace: Pace):
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(24),
            _Clock(),
        )
        self.detail, self._pace = "", pace
        self._current: TaskID | None = None
        super().__init__(*columns, console=console, refresh_per_second=4)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        left = "" if (seconds := self._pace.left()) is None else f"{minutes(seconds)} left, "
        below = f"  {left}peak memory {size(peak_memory())}  {self.detail}"
        yield Text(below, "dim", overflow="ellipsis", no_wrap=True)

    def open_stage(self, name: str, total: int) -> None:
        self.close_stage()
        self.detail = ""
        self._current = self.add_task(name, total=total if total > 1 else None)  # one step: no bar to fill

    def close_stage(self) -> None:
        if self._current is not None:
            self.update(self._current, total=1, completed=1)
            self.stop_task(self._current)  # its clock
            self._current = None

    def advance_stage(self, detail: str) -> None:
        self.detail = detail
        if self._current is not None:
            self.advance(self._current)


class _LiveMonitor(Pace):
    def __init__(self, console: Console):
        super().__init__()
        self.display = _Display(console, self)

    def stage(self, name: str, total: int) -> None:
        super().stage(name, total)
        self.display.open_stage(name, total)

    def step(self, detail: str = "") -> None:
        super().step(detail)
        self.display.advance_stage(detail)

    def note(self, text: str) -> None:
        self.display.console.print(text, markup=False)


def minutes(seconds: float | None) -> str:
    """1:05; 2:00:00 from an hour on."""
    whole = round(seconds or 0)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
