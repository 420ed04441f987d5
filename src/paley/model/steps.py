"""Runs a block in steps: its linears are quantized one after the other, each on what the ones before it make of a text.

A forward stands still where a linear reads its input, until it is told to go on. Each is a greenlet: one thread runs
them in turn, and the frames of the forward keep what has been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from paley.core.memory import give_back
from paley.model.capture import BlockRunner

__all__ = ["KEPT", "Steps", "held"]

KEPT = 900_000_000  # bytes that the forwards of one block may hold while they stand still


def held(hidden: int, widest: int) -> int:
    """Bytes a token, about, that a forward holds as it stands still, of float32.

    hidden: width of the residual stream, which it holds beside what a norm and attention have made of it. widest: of
    all inputs, which is that of the MLP's last linear most often.
    """
    return 4 * (4 * hidden + widest)


class Steps:
    """A block's forwards, one a batch, each with stops where linears read their inputs; to be used in a `with`.

    A linear may be replaced while the forwards stand before it: they go on through the new one. As many forwards stand
    still as fit into KEPT bytes; the others begin anew for each stop.
    """

    def __init__(
        self, runner: BlockRunner, module: nn.Module, index: int, hidden: Tensor,
        stops: Iterable[str] = (), watched: Iterable[str] = (), *, behind: Collection[str] = (),
        out: Tensor, waits: bool = True,
    ):  # fmt: skip
        """hidden, out [sequences, seq_len, hidden]: what the block reads, and where its result goes, may be the same.

        stops: names of linears within the module, in order of computation. watched: names of modules; what they last
        read comes with each stop. behind: stops that are behind the linears, whose outputs come, too, under their
        names. waits: at the last stop, for its linear to be replaced; else each forward ends there at once.
        """
        self._out, self._runner = out, runner
        self._batches, self._targets = (x.split(runner.batch) for x in (hidden, out))
        self._forward = partial(module, **runner.arguments(index, hidden.shape[1]))
        self._module, self._stops, self._watched, self._behind = module, tuple(stops), tuple(watched), behind
        self._waits, self._ended = waits, False
        widths: list[Any] = [module.get_submodule(name).in_features for name in self._stops]
        batch = self._batches[0]
        kept = KEPT // (batch.shape[0] * batch.shape[1] * held(batch.shape[2], max(widths))) if self._stops else 0
        self._passes = [_Pass(self._forward, batch) for batch in self._batches[:kept]]
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for name in self._watched:
                hook = self._module.get_submodule(name).register_forward_pre_hook(partial(_note, name))
                undo.callback(hook.remove)
            for name in self._stops:
                linear: Any = self._module.get_submodule(name)
                linear.forward = partial(_stop, self._module, name, linear, linear.forward, name in self._behind)
                undo.callback(_let_go, linear)
            for one in self._passes:
                undo.callback(one.end)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the forwards and leaves the module as it was, whatever happened."""
        self._undo.close()

    @torch.no_grad()
    def inputs(self, stop: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Goes on to a stop -> of each batch what is read there [batch, seq_len, in], and what was seen on the way."""
        self._ended = stop == self._stops[-1] and not self._waits
        for one, target in zip(self._all(), self._targets, strict=True):
            yield one.go_on(stop), one.seen
            if self._ended:
                one.finish(target)
                give_back()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """To the end -> what the block makes of hidden."""
        if not self._ended:
            for one, target in zip(self._all(), self._targets, strict=True):
                one.finish(target)
        self._runner.work += self._out.shape[0] * self._out.shape[1]
        return self._out

    def _all(self) -> Iterator[_Pass]:
        yield from self._passes
        for batch in self._batches[len(self._passes) :]:
            one = _Pass(self._forward, batch)
            try:
                yield one
            finally:
                one.end()


class _Pass(greenlet):
    """One forward, which can stand still in the middle. seen: watched inputs, and outputs, by name."""

    def __init__(self, forward: Callable[[Tensor], Tensor], hidden: Tensor):
        super().__init__(partial(forward, hidden))
        self.seen: dict[str, Tensor] = {}

    def go_on(self, stop: str | None) -> Tensor:
        """-> what is read at the stop; None: the forward's result. What the forward raises comes out here."""
        self.parent = getcurrent()
        while True:
            reached = self.switch()
            if self.dead:
                assert stop is None, f"the forward ended before {stop}"
                return reached
            if reached[0] == stop:
                return reached[1]

    def finish(self, out: Tensor) -> None:
        """To the end; lets go of all that was held."""
        out.copy_(self.go_on(None))
        self.seen.clear()

    def end(self) -> None:
        """Gives up a forward that stands still; its own frames would keep it alive for good."""
        self.parent = getcurrent()
        self.throw()

    def stand(self, name: str, x: Tensor) -> None:
        """Called within the forward: hands both out, and waits for the next `go_on`."""
        assert self.parent is not None
        self.parent.switch((name, x))


def _stop(module: nn.Module, name: str, linear: nn.Module, forward: Any, behind: bool, x: Tensor) -> Tensor:
    one = getcurrent()
    if not isinstance(one, _Pass):  # a forward beside the steps
        return forward(x)
    if behind:
        one.seen[name] = forward(x)
        one.stand(name, x)
        return one.seen.pop(name)
    one.stand(name, x)
    now = module.get_submodule(name)
    return forward(x) if now is linear else now(x)


def _let_go(linear: Any) -> None:
    """Undoes a stop, and drops an input that the linear was about to share."""
    del linear.forward
    if getattr(linear, "shared_input", None) is not None:
        linear.shared_input.clear()


def _note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    one = getcurrent()
    if isinstance(one, _Pass):
        one.seen[name] = args[0]
