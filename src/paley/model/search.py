"""Searches the clip ratios of a model's inputs and caches, each trial re-running only what it can change.

The hidden states before the block at work are cached, for everything before it is settled; a trial runs from
there to the end (arXiv:2504.13989 evaluates the whole model each time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from paley.arch import Site, Sites
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, Schemes
from paley.methods.gbs import Outcome, Score, bracket_search, gradual_search, local_search
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.reading import prepare_
from paley.model.trials import Objective, Prefix
from paley.model.wrapping import set_attention_, set_input_
from paley.ops.matmul import CALIBRATION, bfloat16_linear
from paley.plan import Trial
from paley.recipe.models import Search

__all__ = ["ClipSearch", "Knob", "knobs", "quicken_"]

S = TypeVar("S", LinearScheme, AttentionScheme)


@dataclass(frozen=True)
class Knob:
    """One number to search: the clip ratio shared by some linears' inputs and some of an attention's caches."""

    name: str
    block: int
    kind: str
    linears: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()  # of "keys", "values"


def _layout(sites: Sites, block: int, layout: str) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(kind, linears, caches) of each number of a block. Ours: what one kernel rounds once. The paper's: one for each
    projection, and the cached values share the number of the linear that makes them.
    """
    for site in sites.of("input", "linear", "keys", "values", block=block):
        if site.kind == "keys" or (site.kind == "values" and layout == "shared"):
            yield site.kind, (), (site.kind,)
        elif site.kind == "input" and layout == "shared":
            yield site.name.rpartition(".")[2], site.readers, ()
        elif site.kind == "linear" and layout == "per_projection":
            held = ("values",) if site.makes(sites.architecture.values) else ()
            yield _short(site), (site.name,), held


def _short(site: Site) -> str:
    return site.name.rpartition(".")[2].removesuffix("_proj")


def knobs(sites: Sites, layout: str, schemes: Schemes) -> list[Knob]:
    """The numbers of `layout` that have anything to quantize, in the order they are visited."""
    found = []
    for block in range(sites.blocks):
        path = sites.attention(block)
        attention = schemes.attentions.get(path, AttentionScheme())
        for kind, paths, caches in _layout(sites, block, layout):
            # One number serves only what is rounded by one scheme; overrides may set members apart.
            alike: dict[ActivationScheme, tuple[list[str], list[str]]] = {}
            for path in paths:
                if (scheme := schemes.linears[path].input) is not None:
                    alike.setdefault(scheme, ([], []))[0].append(path)
            for cache in caches:
                if (scheme := getattr(attention, cache)) is not None:
                    key = next(iter(alike), scheme) if layout == "per_projection" else scheme
                    alike.setdefault(key, ([], []))[1].append(cache)
            for n, (members, held) in enumerate(alike.values()):
                suffix = f"{kind}-{n}" if n else kind
                name = f"{sites.architecture.blocks}.{block}.{suffix}"
                found.append(Knob(name, block, suffix, tuple(members), tuple(held)))
    return found


class ClipSearch:
    """Runs the search on a model whose weights are final, and leaves the found schemes in place.

    reference: the original model's last hidden states [sequences, seq_len, hidden] for the same ids.
    """

    def __init__(
        self,
        runner: BlockRunner,
        ids: Tensor,
        reference: Tensor,
        schemes: Schemes,
        settings: Search,
    ):
        self.runner, self.ids, self.settings = runner, ids, settings
        self.linears, self.attentions = dict(schemes.linears), dict(schemes.attentions)
        self.knobs = {knob.name: knob for knob in knobs(runner.adapter.sites, settings.slots, schemes)}
        self._prefix = Prefix(runner, ids)
        self._objective = Objective(runner, ids, reference, settings.objective)
        self._last: dict[str, float] = {}

    def run(
        self,
        known: Iterable[Trial] = (),
        on_trial: Callable[[Trial], None] = lambda _: None,
        on_knob: Callable[[str, Outcome], None] = lambda name, outcome: None,
    ) -> dict[str, Outcome]:
        """-> each knob's outcome. Trials already `known` (of a stopped run) are taken, not repeated."""
        memo = {(t.slot, t.clip_ratio): t.objective for t in known}
        from_fp = self.settings.start == "from_fp"
        for knob in self.knobs.values():
            self._set(knob, None if from_fp else self._start(knob))

        settled: list[float] = []  # the loss of the model as it stands, once a knob is settled

        def evaluate(name: str, clip_ratio: float) -> float:
            if settled and not from_fp and clip_ratio == self._start(self.knobs[name]):
                return settled[-1]  # from low bits this knob is there already
            if (name, clip_ratio) not in memo:
                memo[name, clip_ratio] = self._loss(self.knobs[name], clip_ratio)
                on_trial(Trial(slot=name, clip_ratio=clip_ratio, objective=memo[name, clip_ratio]))
            return memo[name, clip_ratio]

        def settle(name: str, outcome: Outcome) -> None:
            knob = self.knobs[name]
            self._set(knob, outcome.clip_ratio)
            self._keep(knob, outcome.clip_ratio)
            self._last[knob.kind] = outcome.clip_ratio
            settled.append(outcome.loss)
            on_knob(name, outcome)

        return gradual_search(list(self.knobs), evaluate, settle, self._search)

    def _search(self, name: str, score: Score) -> Outcome:
        knob, iterations = self.knobs[name], self.settings.trials
        start = self._start(knob)
        if self.settings.schedule == "paper":
            found = bracket_search(score, iterations)
            if self.settings.start == "from_low_bit" and found.loss >= (loss := score(start)):
                return Outcome(start, loss)
            return found
        starts = [start, self._last.get(knob.kind, start), 1.0]
        return local_search(score, starts, iterations)

    def _start(self, knob: Knob) -> float:
        """The recipe's clip ratio; the paper's low-bit start is unclipped."""
        if self.settings.schedule == "paper":
            return 1.0
        return self._schemes(knob)[0].clip_ratio

    def _schemes(self, knob: Knob) -> list[ActivationScheme]:
        found = [self.linears[p].input for p in knob.linears]
        if knob.caches:
            attention = self.attentions[self.runner.adapter.blocks[knob.block].attention]
            found += [getattr(attention, cache) for cache in knob.caches]
        return [scheme for scheme in found if scheme is not None]

    def _set(self, knob: Knob, clip_ratio: float | None) -> None:
        """Makes the model round at `knob` with that clip ratio; None: leaves it at full precision."""
        adapter = self.runner.adapter
        block = adapter.blocks[knob.block]
        for path in knob.linears:
            wanted = None if clip_ratio is None else _clipped(self.linears[path], ("input",), clip_ratio)
            set_input_(adapter.module(path), wanted)
        if knob.caches:
            fresh = self.attentions[block.attention]
            now = adapter.module(block.attention).kv_scheme or replace(fresh, keys=None, values=None)
            for cache in knob.caches:
                scheme = None if clip_ratio is None else replace(getattr(fresh, cache), clip_ratio=clip_ratio)
                now = replace(now, **{cache: scheme})
            set_attention_(adapter, block, now)

    def _keep(self, knob: Knob, clip_ratio: float) -> None:
        for path in knob.linears:
            self.linears[path] = _clipped(self.linears[path], ("input",), clip_ratio)
        if knob.caches:
            path = self.runner.adapter.blocks[knob.block].attention
            self.attentions[path] = _clipped(self.attentions[path], knob.caches, clip_ratio)

    @torch.no_grad()
    def _loss(self, knob: Knob, clip_ratio: float) -> float:
        self._set(knob, clip_ratio)
        if self.settings.schedule == "paper":  # as published: the whole model, every time
            hidden = self.runner.suffix(0, self.runner.embed(self.ids))
        else:
            hidden = self.runner.suffix(knob.block, self._prefix.before(knob.block))
        return self._objective(hidden)


class _QuickHead(nn.Module):
    """A head as it is, but for the rounding of `bfloat16_linear`."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x: Tensor) -> Tensor:
        return bfloat16_linear(x, self.weight, self.bias)


def quicken_(adapter: Adapter) -> None:
    """Before a search: products are those of calibration. All trials share their noise; scores are measured without."""
    prepare_(adapter.model, CALIBRATION, torch.float32)
    if type(adapter.head) is nn.Linear:  # a class of its own may do more than multiply
        adapter.model.set_submodule(adapter.architecture.head, _QuickHead(adapter.head))


def _clipped(slot: S, fields: tuple[str, ...], clip_ratio: float) -> S:
    return replace(slot, **{f: replace(getattr(slot, f), clip_ratio=clip_ratio) for f in fields})
