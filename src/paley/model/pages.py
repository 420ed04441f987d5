"""A model of which one block at a time is in memory; the others lie on disk, as pages do that are not in use.

A block is brought when it is about to run, and dropped behind it. Several forwards can go through the model in turn,
so that each block is read once for all of them: one stands still where a block begins, until all have come so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from paley.model.adapter import Adapter, Block
from paley.model.experts import QuantExperts
from paley.model.linear import QuantLinear

__all__ = ["Pages", "Turns", "empty_", "one_after_another", "put_tensor_"]

T = TypeVar("T")
Turns = Callable[[Sequence[Callable[[], Any]]], list[Any]]  # runs jobs -> their results


def one_after_another(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """How jobs run with a model that is in memory."""
    return [job() for job in jobs]


class Pages:
    """The blocks of a model whose parameters there have no values yet.

    read(name, like) -> the tensor of the model of this name, which has the shape of `like`. ready: called with a block
    that was filled.
    """

    def __init__(
        self, adapter: Adapter, read: Callable[[str, Tensor], Tensor], ready: Callable[[Block], None] = lambda _: None
    ):
        self._blocks, self._read, self._ready = adapter.blocks, read, ready
        self._here: set[int] = set()  # brought, and not to be dropped by a forward
        for block in adapter.blocks:
            self._watch_(block.index)

    def bring_(self, index: int) -> None:
        """Fills a block, in float32, and leaves it there until it is dropped."""
        if index not in self._here:
            block = self._blocks[index]
            for name, tensor in block.module.state_dict().items():
                if tensor.is_meta:
                    put_tensor_(block.module, name, self._read(f"{block.name}.{name}", tensor))
            self._here.add(index)
            self._ready(block)

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """While open, a block is in memory, for more than one forward."""
        before = index in self._here
        self.bring_(index)
        try:
            yield
        finally:
            if not before:
                self.drop_(index)

    def drop_(self, index: int) -> None:
        """Takes a block's values out of memory."""
        self._here.discard(index)
        block = self._blocks[index].module
        for part in block.modules():
            if isinstance(part, QuantLinear | QuantExperts):
                part.prepare_("packed")  # what was made ready of the values goes with them
        empty_(block)

    def in_turn(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Runs jobs, each with forwards of the model -> their results; they reach each block together."""
        running = [_Job(job) for job in jobs]
        try:
            waiting = {job: job.go_on() for job in running}
            while waiting := {job: index for job, index in waiting.items() if not job.dead}:
                index = min(waiting.values())
                self.bring_(index)
                for job in [job for job in waiting if waiting[job] == index]:
                    waiting[job] = job.go_on()
                self.drop_(index)
        finally:
            for job in running:
                job.end()
        return [job.result for job in running]

    def _watch_(self, index: int) -> None:
        # Closures, as a copy of the block has these hooks, too, and must not copy the model with them.
        passing: list[bool] = []

        def enter(module: Any, _: Any) -> None:
            computes = "forward" not in vars(module)  # else somebody looks what a block is given
            job = getcurrent()
            if isinstance(job, _Job) and computes:
                job.stand(index)
            passing.append(computes and index not in self._here)
            if passing[-1]:
                self.bring_(index)

        def leave(*_: Any) -> None:
            if passing.pop():
                self.drop_(index)

        block = self._blocks[index].module
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


class _Job(greenlet):
    """One job, which stands still where a block begins; result: what it gave."""

    result: Any = None

    def __init__(self, job: Callable[[], Any]):
        super().__init__(self._run)
        self._job = job

    def _run(self) -> int:
        self.result = self._job()
        return -1

    def go_on(self) -> int:
        """-> the block that it has come to. What the job raises comes out here."""
        self.parent = getcurrent()
        return self.switch()

    def stand(self, index: int) -> None:
        """Called within the job: waits for the next `go_on`."""
        assert self.parent is not None
        self.parent.switch(index)

    def end(self) -> None:
        """Gives up a job that stands still."""
        if not self.dead:
            self.parent = getcurrent()
            self.throw()


def empty_(module: nn.Module) -> None:
    """Takes the values of all that a file holds of a module."""
    for name, tensor in module.state_dict().items():
        put_tensor_(module, name, tensor.to("meta"))


def put_tensor_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer, as it is, with no copy."""
    path, _, last = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[last] = tensor
