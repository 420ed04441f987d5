"""Runs a decoder block by block over batches of token blocks, so that a prefix is computed once and kept.

`Steps` runs one block in parts: its linears can be quantized one after the other, each on what the ones before it make
of the tokens, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from paley.model.adapter import Adapter

__all__ = ["BlockRunner", "Steps", "capture_inputs"]


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward whose rest is not needed."""


class BlockRunner:
    """Hidden states [sequences, seq_len, hidden] through an adapter's blocks, `batch` sequences at a time.

    `work` counts block-forwards times tokens: the unit in which searches are compared.
    """

    def __init__(self, adapter: Adapter, batch: int = 8):
        self.adapter = adapter
        self.batch = batch
        self.work = 0
        self._kwargs: dict[int, list[dict]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids [sequences, seq_len] -> what the first block reads."""
        self._prepare(ids.shape[1])
        return self.adapter.embedding(ids)

    @torch.no_grad()
    def block(self, index: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """What block `index` makes of its inputs; written into `out` where given (may be `hidden` itself)."""
        return self.run(self.adapter.blocks[index].module, index, hidden, out)

    @torch.no_grad()
    def run(self, module: nn.Module, index: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """As `block`, with another module in the place of block `index`."""
        return Steps(self, module, index, hidden).finish(out)

    @torch.no_grad()
    def until(self, part: nn.Module, module: nn.Module, index: int, hidden: Tensor) -> None:
        """As `run` on one batch, but stops before `part` of the module would compute."""

        def stop(*_: object) -> None:
            raise _Stop

        handle = part.register_forward_pre_hook(stop)
        try:
            module(hidden, **self.arguments(index, hidden.shape[1]))
        except _Stop:
            pass
        finally:
            handle.remove()
        self.work += hidden.shape[0] * hidden.shape[1]

    @torch.no_grad()
    def suffix(self, index: int, hidden: Tensor) -> Tensor:
        """Inputs of block `index` -> outputs of the last block."""
        for i in range(index, len(self.adapter.blocks)):
            hidden = self.block(i, hidden)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Outputs of the last block [..., hidden] -> logits [..., vocab], by the model's head or another."""
        return (self.adapter.head if head is None else head)(self.adapter.norm(hidden))

    def arguments(self, index: int, seq_len: int) -> dict:
        """What the forward of block `index` takes beside hidden states: masks, rotary tables."""
        return self._kwargs[seq_len][index]

    def _prepare(self, seq_len: int) -> None:
        """Learns each block's arguments (masks, rotary tables) from one forward of the whole model."""
        if seq_len in self._kwargs:
            return
        seen: dict[int, dict] = {}

        def remember(index: int) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                seen[index] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

            return hook

        handles = [
            block.module.register_forward_pre_hook(remember(block.index), with_kwargs=True)
            for block in self.adapter.blocks
        ]
        try:
            ids = torch.zeros(1, seq_len, dtype=torch.long, device=self.adapter.model.device)
            self.adapter.model(ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        self._kwargs[seq_len] = [seen[i] for i in range(len(self.adapter.blocks))]


class Steps:
    """A block's forwards of all batches, side by side; each stops where one of the linears in `stops` reads its input.

    A linear may be replaced while the forwards stand before it: they go on through the new one. hidden [sequences,
    seq_len, hidden]; stops: names within the module, in order of computation; watched: names of modules whose last
    input `inputs` gives too. behind: stop behind these linears instead, and give their outputs under their names too.
    """

    def __init__(
        self, runner: BlockRunner, module: nn.Module, index: int, hidden: Tensor,
        stops: Iterable[str] = (), watched: Iterable[str] = (), *, behind: bool = False,
    ):  # fmt: skip
        self._runner, self._hidden = runner, hidden
        for name in stops:
            _stop_at(module, name, behind)
        self._handles = [module.get_submodule(name).register_forward_pre_hook(partial(_note, name)) for name in watched]
        forward = partial(module, **runner.arguments(index, hidden.shape[1]))
        self._passes = [_Pass(forward, batch) for batch in hidden.split(runner.batch)]

    @torch.no_grad()
    def inputs(self, stop: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Goes on to a stop -> of each batch what is read there [batch, seq_len, in], and what was seen on the way."""
        for one in self._passes:
            reached, x = one.go_on()
            assert reached == stop, f"the forward came to {reached}, expected {stop}"
            yield x, one.seen

    @torch.no_grad()
    def finish(self, out: Tensor | None = None) -> Tensor:
        """To the end -> what the block makes of hidden; written into `out` where given (may be `hidden` itself)."""
        out = torch.empty_like(self._hidden) if out is None else out
        for one, target in zip(self._passes, out.split(self._runner.batch), strict=True):
            target.copy_(one.go_on())
        for handle in self._handles:
            handle.remove()
        self._runner.work += self._hidden.shape[0] * self._hidden.shape[1]
        return out


class _Pass(greenlet):
    """One forward, which can stand still in the middle. seen: watched inputs, and outputs, by name."""

    def __init__(self, forward: Callable[[Tensor], Tensor], hidden: Tensor):
        super().__init__(partial(forward, hidden))
        self.seen: dict[str, Tensor] = {}

    def go_on(self) -> Any:
        """-> (name, input) at a stop, the forward's result at its end. What it raises comes out here."""
        self.parent = getcurrent()
        return self.switch()

    def stand(self, reached: object) -> None:
        """Called within the forward: hands `reached` out, and waits for the next `go_on`."""
        assert self.parent is not None
        self.parent.switch(reached)


def _stop_at(module: nn.Module, name: str, behind: bool) -> None:
    linear: Any = module.get_submodule(name)
    forward = linear.forward

    def stop(x: Tensor) -> Tensor:
        one = getcurrent()
        assert isinstance(one, _Pass)
        if behind:
            one.seen[name] = forward(x)
            one.stand((name, x))
            return one.seen.pop(name)
        one.stand((name, x))
        now = module.get_submodule(name)
        return forward(x) if now is linear else now(x)

    linear.forward = stop


def _note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    one = getcurrent()
    assert isinstance(one, _Pass)
    one.seen[name] = args[0]


@contextmanager
def capture_inputs(linears: dict[str, nn.Module], sink: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `sink(key, input [tokens, in])` is called at every forward of each linear."""

    def hook(key: str) -> Callable:
        return lambda module, args: sink(key, args[0].flatten(0, -2))

    handles = [linear.register_forward_pre_hook(hook(key)) for key, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
