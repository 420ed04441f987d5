"""Runs a decoder block by block over batches of token blocks, so that a prefix is computed once and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from paley.kernels.floats import quickly
from paley.model.adapter import Adapter

__all__ = ["BATCH", "BlockRunner", "capture_inputs"]

BATCH = 4  # sequences at a time: what a block makes of more leaves the processor's caches before it is read again

LOGITS = 2**24  # that exist at a time in each tensor of them: 64 MB


class BlockRunner:
    """Hidden states [sequences, seq_len, hidden] through an adapter's blocks, `batch` sequences at a time.

    `work` counts block-forwards times tokens: the unit in which searches are compared. held(index): while open, that
    block is in memory, if not all of them are.
    """

    def __init__(self, adapter: Adapter, batch: int = BATCH):
        self.adapter = adapter
        self.batch = batch
        self.work = 0
        self.held: Callable[[int], AbstractContextManager[Any]] = nullcontext
        self._kwargs: dict[int, list[dict]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids [sequences, seq_len] -> what the first block reads."""
        hidden = self.look_up(ids)
        if (factor := self.adapter.architecture.number(self.adapter.model.config, "embedding_multiplier")) is not None:
            hidden = hidden * factor
        self._prepare(hidden[:1])
        return hidden

    def look_up(self, ids: Tensor) -> Tensor:
        """ids [...] -> their rows of the embedding, in float32."""
        return _look_up(self.adapter.embedding, ids)

    @torch.no_grad()
    def block(self, index: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """What block `index` makes of its inputs; written into `out` where given (may be `hidden` itself)."""
        with self.held(index):
            return self.run(self.adapter.blocks[index].module, index, hidden, out)

    @torch.no_grad()
    @quickly
    def run(self, module: nn.Module, index: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """As `block`, with another module in the place of block `index`."""
        kwargs = self.arguments(index, hidden.shape[1])
        out = torch.empty_like(hidden) if out is None else out
        for source, target in zip(hidden.split(self.batch), out.split(self.batch), strict=True):
            target.copy_(module(source, **kwargs))
        self.work += hidden.shape[0] * hidden.shape[1]
        return out

    @torch.no_grad()
    def suffix(self, index: int, hidden: Tensor) -> Tensor:
        """Inputs of block `index` -> outputs of the last block."""
        for i in range(index, len(self.adapter.blocks)):
            hidden = self.block(i, hidden)
        return hidden

    @torch.no_grad()
    @quickly
    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Outputs of the last block [..., hidden] -> logits [..., vocab], by the model's head or another."""
        return self.adapter.finish((self.adapter.head if head is None else head)(self.adapter.norm(hidden)))

    def few_tokens(self, hidden: Tensor) -> Sequence[Tensor]:
        """Outputs of the last block [sequences, seq_len, hidden] -> parts for `logits`, whose logits are small."""
        return hidden.flatten(0, 1).split(max(1, LOGITS // self.adapter.sites.head.shape[0]))

    @torch.no_grad()
    def head_input(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """Outputs of the last block [sequences, seq_len, hidden] -> what the head reads."""
        return self.adapter.norm(hidden)

    def arguments(self, index: int, seq_len: int) -> dict:
        """What the forward of block `index` takes beside hidden states: masks, rotary tables."""
        return self._kwargs[seq_len][index]

    def _prepare(self, hidden: Tensor) -> None:
        """Learns each block's arguments (masks, rotary tables) from a forward of the model in which no block computes.

        hidden [1, seq_len, hidden]: the tables get its type.
        """
        if hidden.shape[1] in self._kwargs:
            return
        seen: list[dict] = []

        def pass_by(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            seen.append(kwargs)
            return hidden_states

        modules: list[Any] = [block.module for block in self.adapter.blocks]
        try:
            for module in modules:
                module.forward = pass_by
            self.adapter.model.base_model(inputs_embeds=hidden, use_cache=False)
        finally:
            for module in modules:
                del module.forward
        self._kwargs[hidden.shape[1]] = seen


def _look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """ids [...] -> what an embedding makes of them, in float32, also if it holds 16 bits."""
    weight = embedding.weight
    if not isinstance(weight, Tensor) or weight.dtype == torch.float32:
        return embedding(ids)
    used, places = ids.unique(return_inverse=True)
    few: Any = copy.copy(embedding)  # with no other rows than these
    few._parameters = {"weight": nn.Parameter(weight[used].float(), requires_grad=False)}
    few.padding_idx = None
    return few(places)


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
