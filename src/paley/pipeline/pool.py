"""Who does the work: this process, some more on this machine, or a Ray cluster. One code path, an engine more or less.

A task is a function of a module and its argument, both of which can be pickled; what is large lies in files that all
workers reach. A task may be begun again if its worker is lost, so that it must leave a whole file or none.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch

from paley.core.errors import PaleyError, Setting
from paley.pipeline.machine import free_memory

__all__ = ["Here", "Pool", "Processes", "again", "begin", "check_fit", "check_shared", "pool_of"]

T = TypeVar("T")
R = TypeVar("R")


class Pool(Protocol):
    """workers: how many tasks are at work at a time."""

    @property
    def workers(self) -> int: ...

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """The results, as they come. Errors: what a task raises; PaleyError for workers that are lost for good."""
        ...

    def check(self, *folders: Path, output: Path | None = None, memory: int = 0) -> None:
        """Raises unless all workers run this Paley and see these folders, and `output`, to which this one may write.

        memory: bytes that each worker takes; raises where there are too many for what is free.
        """
        ...

    def release(self) -> None:
        """Ends idle workers, which may hold models; more work begins others."""
        ...


@dataclass(frozen=True)
class Here:
    """This process, one task after the other."""

    workers: int = 1

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        with _one_thread():
            yield from map(task, items)

    def check(self, *folders: Path, output: Path | None = None, memory: int = 0) -> None:
        """It sees what it sees, and takes what there is."""

    def release(self) -> None:
        """There are none."""


@dataclass
class Processes:
    """Processes of this machine, begun with the first work and ended with the `with` that they are used in.

    resumes: whether a run that ends can go on, which errors advise.
    """

    workers: int
    resumes: bool = True
    _begun: ProcessPoolExecutor | None = field(default=None, init=False, repr=False)
    _processes: set[BaseProcess] = field(default_factory=set, init=False, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        if self._begun is None:
            if len(items) <= 1:
                yield from Here().run(task, items)
                return
            # Spawned, as torch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._begun = ProcessPoolExecutor(self.workers, mp_context=context, initializer=begin)
        try:
            others = set(active_children())
            with _no_interrupt():
                asked = [self._begun.submit(task, item) for item in items]
            self._processes |= set(active_children()) - others  # which begin as there is work for them
            for done in as_completed(asked):
                yield done.result()
        except BrokenProcessPool:
            self.release()
            raise PaleyError(
                f"one of the {self.workers} processes was ended from outside, as a system does that runs out of memory",
                remedy=(*again(self.resumes), " and" if self.resumes else " with", " fewer ", Setting("workers")),
            ) from None
        except BaseException:
            for process in self._processes:  # at once: they may still import for seconds
                process.terminate()
            self.release()
            raise

    def release(self) -> None:
        if self._begun is not None:
            self._begun.shutdown(cancel_futures=True)
            self._begun = None
            self._processes.clear()

    def check(self, *folders: Path, output: Path | None = None, memory: int = 0) -> None:
        """They are on this machine."""
        check_fit(self.workers, memory, free_memory())


def check_shared(workers: int, ray: str | None, device: str) -> None:
    """Raises where work is to be shared that a GPU is to do."""
    if (workers > 1 or ray is not None) and device != "cpu":
        raise PaleyError(
            Setting("device", device), ": workers compute on the CPU", remedy=("leave ", Setting("workers"), " out")
        )


def check_fit(workers: int, memory: int, free: int | None) -> None:
    """Raises if so many workers of this machine, each with so many bytes, need more than is free; None: unknown."""
    if free is None or workers * memory <= free:
        return
    most, each = free // memory, memory / 2**30
    if most > 1:
        remedy = ("use ", Setting("workers", most))
    elif most and workers > 1:
        remedy = ("leave ", Setting("workers"), " out")
    else:
        remedy = ("use a machine with more memory",)
    who = f"{workers} workers need about {each:.1f} GiB each" if workers > 1 else f"a worker needs about {each:.1f} GiB"
    raise PaleyError(f"memory: {who}, and {free / 2**30:.1f} GiB are free", remedy=remedy)


def pool_of(workers: int, ray: str | None = None, *, resumes: bool = True) -> AbstractContextManager[Pool]:
    """The pool for these settings, to be used in a `with`; ray: as of `paley.pipeline.cluster.cluster`."""
    if ray is not None:
        from paley.pipeline.cluster import cluster

        return cluster(ray, workers, resumes=resumes)
    return nullcontext(Here()) if workers <= 1 else Processes(workers, resumes)


def again(resumes: bool) -> tuple[str | Setting, ...]:
    """What to do after work was lost."""
    return ("go on with ", Setting("resume", True)) if resumes else ("begin again",)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back, also from the processes started here, whose imports would each print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin() -> None:
    """What a new process must know: to use one thread, and to end without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the parent has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On pieces as small as these threads wait for each other more than they work; processes share the work instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
