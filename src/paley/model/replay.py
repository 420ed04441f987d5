"""Runs the blocks of a model without a row one by one: each gets again what a forward of the whole model gave it.

What blocks are given beside the hidden states (masks, tables, biases) is recorded on one text and given again on every
other. That this is the model is tried out first, on a text of its own: what depends on more than shapes is found so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError, Setting
from paley.model.adapter import Adapter
from paley.model.capture import BATCH, BlockRunner, capture_inputs
from paley.model.outputs import Stop

__all__ = ["Replay", "runner_of"]

_TRIED = 24  # tokens
_NEAR = 1e-3  # of the largest logit


def runner_of(adapter: Adapter, batch: int = BATCH) -> BlockRunner:
    """What runs an adapter's blocks."""
    return Replay(adapter, batch) if adapter.architecture.walked else BlockRunner(adapter, batch)


@dataclass(frozen=True)
class _Call:
    """How a model calls a block: all it gives beside the hidden states; how long a tuple it gets back, 0 if none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: int


class Replay(BlockRunner):
    """As BlockRunner. Errors: PaleyError for blocks that need more than hidden states and what follows from shapes."""

    def __init__(self, adapter: Adapter, batch: int = BATCH):
        super().__init__(adapter, batch)
        self._calls: dict[tuple[int, int], list[_Call]] = {}
        self._tried = False

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids [sequences, seq_len] -> what the first block reads."""
        if not self._tried:
            self._try_out()
        parts = [self._first(part) for part in ids.split(self.batch)]
        for part in parts:  # now: blocks may leave memory when they are done, and statistics must not see this text
            self._known(part)
        return torch.cat(parts)

    @torch.no_grad()
    def run(self, module: nn.Module, index: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(hidden) if out is None else out
        for source, target in zip(hidden.split(self.batch), out.split(self.batch), strict=True):
            target.copy_(self._block(module, self._known(source)[index], source))
        self.work += hidden.shape[0] * hidden.shape[1]
        return out

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Outputs of the last block [sequences, seq_len, hidden] -> logits: the model's own way from there."""
        calls, model, row = self._known(hidden), self.adapter.model, self.adapter.architecture
        own = self.adapter.head
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        last = len(calls) - 1
        try:
            if head is not None:
                model.set_submodule(row.head, head)
            with self._blocks_replaced(lambda i, given: _packed(calls[i], hidden if i == last else given)):
                return model(input_ids=ids, use_cache=False).logits
        finally:
            model.set_submodule(row.head, own)

    def few_tokens(self, hidden: Tensor) -> Sequence[Tensor]:
        """Single sequences, as the model is run on whole ones."""
        return hidden.split(1)

    @torch.no_grad()
    def head_input(self, hidden: Tensor, head: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        with capture_inputs({"head": head}, lambda _, x: seen.append(x)):
            self.logits(hidden)
        return seen[0]

    def _first(self, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(i: int, given: Tensor) -> Tensor:
            seen.append(given)
            raise Stop

        try:
            with self._blocks_replaced(stop):
                self.adapter.model(input_ids=ids, use_cache=False)
        except Stop:
            pass
        return seen[0].float() if seen[0].dtype.itemsize < 4 else seen[0]

    def _known(self, hidden: Tensor) -> list[_Call]:
        """How blocks are called for hidden states of this shape; recorded once, on some text."""
        batch, tokens = hidden.shape[:2]
        if (batch, tokens) not in self._calls:
            self._calls[batch, tokens] = self._recorded(_some_ids(self.adapter, batch, tokens, seed=1))
        return self._calls[batch, tokens]

    def _recorded(self, ids: Tensor) -> list[_Call]:
        calls: dict[int, _Call] = {}
        handles = []
        for block in self.adapter.blocks:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = block.index) -> None:
                if index in calls:
                    raise PaleyError(_why(self.adapter, "a block runs more than once"), remedy=_way_out())
                returned = len(output) if isinstance(output, tuple | list) else 0
                calls[index] = _Call(tuple(args[1:]), dict(kwargs), returned)
                given, made = _hidden_of(args, kwargs), output[0] if returned else output
                if given is None or not isinstance(made, Tensor) or given.shape != made.shape or given.dim() != 3:
                    raise PaleyError(
                        _why(self.adapter, "its blocks do not turn hidden states into such"), remedy=_way_out()
                    )

            handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
        try:
            self.adapter.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.adapter.blocks):
            raise PaleyError(_why(self.adapter, "not every block runs"), remedy=_way_out())
        return [calls[block.index] for block in self.adapter.blocks]

    @torch.no_grad()
    def _try_out(self) -> None:
        """Raises unless blocks one by one are the model, on a text other than the recorded one."""
        self._tried = True
        ids = _some_ids(self.adapter, 2, _TRIED, seed=2)
        wanted = self.adapter.model(input_ids=ids, use_cache=False).logits
        try:
            found = self.logits(self.suffix(0, self._first(ids)))
        except PaleyError:
            raise
        except Exception as error:  # each family has its own
            raise PaleyError(_why(self.adapter, " ".join(str(error).split())[:200]), remedy=_way_out()) from error
        if not bool((found - wanted).abs().max() <= _NEAR * wanted.abs().max()):
            raise PaleyError(_why(self.adapter, "they depend on more than their hidden states"), remedy=_way_out())

    def _block(self, module: nn.Module, call: _Call, hidden: Tensor) -> Tensor:
        if "hidden_states" in call.kwargs:
            made = module(*call.args, **(call.kwargs | {"hidden_states": hidden}))
        else:
            made = module(hidden, *call.args, **call.kwargs)
        return made[0] if call.returned else made

    @contextmanager
    def _blocks_replaced(self, f: Callable[[int, Tensor], Any]) -> Iterator[None]:
        """While open, block i gives f(i, the hidden states it is given) and computes nothing."""
        modules: list[Any] = [block.module for block in self.adapter.blocks]
        try:
            for index, module in enumerate(modules):
                module.forward = lambda *args, index=index, **kwargs: f(index, _hidden_of(args, kwargs))
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _packed(call: _Call, hidden: Tensor) -> Any:
    return (hidden, *[None] * (call.returned - 1)) if call.returned else hidden


def _some_ids(adapter: Adapter, batch: int, tokens: int, seed: int) -> Tensor:
    vocabulary = adapter.sites.embedding.shape[0]
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(adapter.device)


def _why(adapter: Adapter, what: str) -> str:
    return f"architecture {adapter.model.config.model_type!r}: its blocks cannot be run one by one: {what}"


def _way_out() -> tuple[Any, ...]:
    return (
        "quantize without calibration: ",
        Setting("preset", "higgs-4"),
        ", or weights.method=nearest and search.method=none",
    )
