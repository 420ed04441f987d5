"""A block without a row that is being quantized beside the original of it: all of its linears see one run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from torch import Tensor, nn

from paley.arch import Site
from paley.methods.statistics import InputStatistics
from paley.model.adapter import Block
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.linear import QuantLinear

__all__ = ["GatheredBlock"]


class GatheredBlock:
    """As ComparedBlock, where nobody knows in which order linears compute, or what they add to: each aims at its own
    outputs on what it reads while the others of its block are still unquantized.
    """

    def __init__(
        self, runner: BlockRunner, block: Block, reference: nn.Module, hidden: Tensor, original: Tensor,
        inputs: Sequence[Site], place: Callable[[str, Tensor], Tensor],
    ):  # fmt: skip
        self._runner, self._block, self._reference = runner, block, reference
        self._hidden, self._original, self._place = hidden, original, place
        self._sums = {site.readers[0]: InputStatistics() for site in inputs}

    def __enter__(self) -> Self:
        linears = {path: self._runner.adapter.module(path) for path in self._sums}

        def add(path: str, x: Tensor) -> None:
            linear = linears[path]
            assert isinstance(linear, QuantLinear)
            self._sums[path].add(linear.round_input(x))

        if linears:
            with capture_inputs(linears, add):
                self._runner.run(self._block.module, self._block.index, self._hidden)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def statistics(self, site: Site, groups: Iterable[tuple[Site, ...]]) -> dict[tuple[Site, ...], InputStatistics]:
        return {alike: self._sums[alike[0].name] for alike in groups}

    def finish(self) -> tuple[Tensor, Tensor]:
        """-> the hidden states after the block, and the original's."""
        run, index, place = self._runner.run, self._block.index, self._place
        hidden = run(self._block.module, index, self._hidden, out=place("hidden", self._hidden))
        return hidden, run(self._reference, index, self._original, out=place("original", self._original))
