"""A block that is being quantized beside the original of it: what its linears read, and what they should give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Self

from torch import Tensor, nn

from paley.arch import Site
from paley.methods.statistics import InputStatistics
from paley.model.adapter import Block
from paley.model.capture import BlockRunner
from paley.model.linear import QuantLinear
from paley.model.steps import Steps

__all__ = ["ComparedBlock"]


class ComparedBlock:
    """A block at work and the original of it, in steps, each on its own hidden states; to be used in a `with`."""

    def __init__(
        self, runner: BlockRunner, block: Block, reference: nn.Module, hidden: Tensor, original: Tensor,
        inputs: Sequence[Site], compensate: str, place: Callable[[str, Tensor], Tensor],
    ):  # fmt: skip
        """hidden, original [sequences, seq_len, hidden]: what the two read. compensate: as in Recipe.

        inputs: those that statistics are wanted of, in order of computation. place: as of `ModelQuantizer`; the
        original's states may change once the last of the statistics are there.
        """
        self._block, self._reference, self._compensate = block, reference, compensate
        adapter = runner.adapter
        self._sites = adapter.sites
        self._added = adapter.architecture.number(adapter.model.config, "residual_multiplier", 1.0)
        names = [self._first(site) for site in inputs]
        norms = {norm for site in inputs if (norm := self._norm(site)) is not None}
        self._now = Steps(
            runner, block.module, block.index, hidden, names, norms, out=place("hidden", hidden)
        )  # fmt: skip
        self._then = Steps(
            runner, reference, block.index, original, names if self._compares else [], norms, waits=False,
            behind={self._first(site) for site in inputs if self._norm(site) is not None},
            out=place("original", original),
        )  # fmt: skip

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for steps in (self._now, self._then):
                undo.enter_context(steps)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def _compares(self) -> bool:
        return self._compensate != "plain"

    def _first(self, site: Site) -> str:
        """The linear, within the block, that reads an input first."""
        return self._block.local(self._sites[site.readers[0]].module)

    def _norm(self, site: Site) -> str | None:
        """The norm that reads the stream which an input's only linear adds to; None: it aims at its own outputs.

        So does what does not add to the stream by itself, as where a norm comes after it.
        """
        reader = self._sites[site.readers[0]]
        alone = self._compensate == "residual_stream" and len(site.readers) == 1 and reader.adds_to_stream
        return self._block.local(reader.norm) if alone and reader.norm is not None else None

    def statistics(self, site: Site, groups: Iterable[tuple[Site, ...]]) -> dict[tuple[Site, ...], InputStatistics]:
        """Of each group of linears, which round the input alike, its second moments, and the outputs to aim at."""
        sums = {alike: InputStatistics() for alike in groups}
        name, norm = self._first(site), self._norm(site)
        for x, seen, x_then, then in self._inputs(name):
            for alike, statistics in sums.items():
                local = self._block.local(alike[0].module)
                linear, original = (part.get_submodule(local) for part in (self._block.module, self._reference))
                assert isinstance(linear, QuantLinear)
                assert isinstance(original, QuantLinear)
                rounded = linear.round_input(x).flatten(0, -2)
                if x_then is None:
                    statistics.add(rounded)
                elif norm is None:
                    statistics.add(rounded, original.round_input(x_then).flatten(0, -2))
                else:
                    # The next norm divides each token by its size: an error counts relative to it. Without this the
                    # few tokens with massive activations would decide everything.
                    stream = (then[norm] + then[name] * self._added).flatten(0, -2)
                    scale = stream.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
                    outputs = (stream - seen[norm].flatten(0, -2)) / self._added
                    outputs = outputs if original.bias is None else outputs - original.bias
                    statistics.add(rounded * scale, outputs=outputs * scale)
        return sums

    def _inputs(self, name: str) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor | None, dict[str, Tensor]]]:
        """Of each batch what a linear reads, and what was seen on the way: in the block, then in the original."""
        now = self._now.inputs(name)
        if not self._compares:
            yield from ((x, seen, None, {}) for x, seen in now)
            return
        for (x, seen), (x_then, seen_then) in zip(now, self._then.inputs(name), strict=True):
            yield x, seen, x_then, seen_then

    def finish(self) -> tuple[Tensor, Tensor]:
        """-> the hidden states after the block, and the original's."""
        original = self._then.finish()
        return self._now.finish(), original
