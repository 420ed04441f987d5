"""Runs a decoder block by block over batches of token blocks, so that a prefix is computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paley.model.adapter import Adapter

__all__ = ["BlockRunner", "capture_inputs"]


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
        kwargs = self.arguments(index, hidden.shape[1])
        out = torch.empty_like(hidden) if out is None else out
        for source, target in zip(hidden.split(self.batch), out.split(self.batch), strict=True):
            target.copy_(module(source, **kwargs))
        self.work += hidden.shape[0] * hidden.shape[1]
        return out

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
