"""Searches the clip ratios of a model's activation and KV slots, each trial re-running only what it can change.

The hidden states before the block at work are cached, for everything before it is settled; a trial runs from
there to the end (arXiv:2504.13989 evaluates the whole model each time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from paley.core.schemes import ActivationScheme, AttentionSlot, LinearSlot
from paley.methods.gbs import Outcome, Score, bracket_search, gradual_search, local_search
from paley.model.adapter import SHARED_INPUTS, Adapter
from paley.model.calibrate import set_attention_, set_input_
from paley.model.capture import BlockRunner
from paley.model.trials import Objective, Prefix
from paley.plan import Trial
from paley.recipe.models import Search

__all__ = ["ClipSearch", "SearchSlot", "search_slots"]

S = TypeVar("S", LinearSlot, AttentionSlot)


@dataclass(frozen=True)
class SearchSlot:
    """One number to search: the clip ratio shared by some linears' inputs and some of an attention's caches."""

    name: str
    block: int
    kind: str
    linears: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()  # of "keys", "values"


# The paper's eight slots a layer: the V cache shares v_proj's number. Ours: what one kernel rounds once.
_LAYOUTS = {
    "per_projection": (
        ("q", ("q",), ()),
        ("k", ("k",), ()),
        ("v", ("v",), ("values",)),
        ("keys", (), ("keys",)),
        ("o", ("o",), ()),
        ("gate", ("gate",), ()),
        ("up", ("up",), ()),
        ("down", ("down",), ()),
    ),
    "shared": (
        ("attn_input", SHARED_INPUTS[0][1], ()),
        ("keys", (), ("keys",)),
        ("values", (), ("values",)),
        ("o_input", SHARED_INPUTS[1][1], ()),
        ("mlp_input", SHARED_INPUTS[2][1], ()),
        ("down_input", SHARED_INPUTS[3][1], ()),
    ),
}


def search_slots(
    adapter: Adapter, layout: str, linears: dict[str, LinearSlot], attentions: dict[str, AttentionSlot]
) -> list[SearchSlot]:
    """The slots of `layout` that have anything to quantize, in the order they are visited."""
    slots = []
    for block in adapter.blocks:
        attention = attentions[block.path("attention")]
        for kind, roles, caches in _LAYOUTS[layout]:
            # One number serves only what is rounded by one scheme; overrides may set members apart.
            schemes: dict[ActivationScheme, tuple[list[str], list[str]]] = {}
            for path in map(block.path, roles):
                if (scheme := linears[path].input) is not None:
                    schemes.setdefault(scheme, ([], []))[0].append(path)
            for cache in caches:
                if (scheme := getattr(attention, cache)) is not None:
                    key = next(iter(schemes), scheme) if layout == "per_projection" else scheme
                    schemes.setdefault(key, ([], []))[1].append(cache)
            for n, (paths, held) in enumerate(schemes.values()):
                suffix = f"{kind}-{n}" if n else kind
                slots.append(SearchSlot(f"{block.name}.{suffix}", block.index, suffix, tuple(paths), tuple(held)))
    return slots


class ClipSearch:
    """Runs the search on a model whose weights are final, and leaves the found schemes in place.

    reference: the original model's last hidden states [sequences, seq_len, hidden] for the same ids.
    """

    def __init__(
        self,
        runner: BlockRunner,
        ids: Tensor,
        reference: Tensor,
        linears: dict[str, LinearSlot],
        attentions: dict[str, AttentionSlot],
        settings: Search,
    ):
        self.runner, self.ids, self.settings = runner, ids, settings
        self.linears, self.attentions = dict(linears), dict(attentions)
        self.slots = {s.name: s for s in search_slots(runner.adapter, settings.slots, linears, attentions)}
        self._prefix = Prefix(runner, ids)
        self._objective = Objective(runner, ids, reference, settings.objective)
        self._last: dict[str, float] = {}

    def run(
        self,
        known: Iterable[Trial] = (),
        on_trial: Callable[[Trial], None] = lambda _: None,
        on_slot: Callable[[str, Outcome], None] = lambda name, outcome: None,
    ) -> dict[str, Outcome]:
        """-> each slot's outcome. Trials already `known` (of a stopped run) are taken, not repeated."""
        memo = {(t.slot, t.clip_ratio): t.objective for t in known}
        from_fp = self.settings.start == "from_fp"
        for slot in self.slots.values():
            self._set(slot, None if from_fp else self._start(slot))

        settled: list[float] = []  # the loss of the model as it stands, once a slot is settled

        def evaluate(name: str, clip_ratio: float) -> float:
            if settled and not from_fp and clip_ratio == self._start(self.slots[name]):
                return settled[-1]  # from low bits this slot is there already
            if (name, clip_ratio) not in memo:
                memo[name, clip_ratio] = self._loss(self.slots[name], clip_ratio)
                on_trial(Trial(slot=name, clip_ratio=clip_ratio, objective=memo[name, clip_ratio]))
            return memo[name, clip_ratio]

        def settle(name: str, outcome: Outcome) -> None:
            slot = self.slots[name]
            self._set(slot, outcome.clip_ratio)
            self._keep(slot, outcome.clip_ratio)
            self._last[slot.kind] = outcome.clip_ratio
            settled.append(outcome.loss)
            on_slot(name, outcome)

        return gradual_search(list(self.slots), evaluate, settle, self._search)

    def _search(self, name: str, score: Score) -> Outcome:
        slot, iterations = self.slots[name], self.settings.trials
        start = self._start(slot)
        if self.settings.schedule == "paper":
            found = bracket_search(score, iterations)
            if self.settings.start == "from_low_bit" and found.loss >= (loss := score(start)):
                return Outcome(start, loss)
            return found
        starts = [start, self._last.get(slot.kind, start), 1.0]
        return local_search(score, starts, iterations)

    def _start(self, slot: SearchSlot) -> float:
        """The recipe's clip ratio; the paper's low-bit start is unclipped."""
        if self.settings.schedule == "paper":
            return 1.0
        return self._schemes(slot)[0].clip_ratio

    def _schemes(self, slot: SearchSlot) -> list[ActivationScheme]:
        attention = self.attentions[self.runner.adapter.blocks[slot.block].path("attention")]
        found = [self.linears[p].input for p in slot.linears] + [getattr(attention, c) for c in slot.caches]
        return [scheme for scheme in found if scheme is not None]

    def _set(self, slot: SearchSlot, clip_ratio: float | None) -> None:
        """Makes the model round at `slot` with that clip ratio; None: leaves it at full precision."""
        block = self.runner.adapter.blocks[slot.block]
        for path in slot.linears:
            wanted = None if clip_ratio is None else _clipped(self.linears[path], ("input",), clip_ratio)
            set_input_(self.runner.adapter.model.get_submodule(path), wanted)
        if slot.caches:
            path = block.path("attention")
            fresh = self.attentions[path]
            now = block.part("attention").kv_slot or replace(fresh, keys=None, values=None)
            for cache in slot.caches:
                scheme = None if clip_ratio is None else replace(getattr(fresh, cache), clip_ratio=clip_ratio)
                now = replace(now, **{cache: scheme})
            set_attention_(block, now)

    def _keep(self, slot: SearchSlot, clip_ratio: float) -> None:
        for path in slot.linears:
            self.linears[path] = _clipped(self.linears[path], ("input",), clip_ratio)
        if slot.caches:
            path = self.runner.adapter.blocks[slot.block].path("attention")
            self.attentions[path] = _clipped(self.attentions[path], slot.caches, clip_ratio)

    @torch.no_grad()
    def _loss(self, slot: SearchSlot, clip_ratio: float) -> float:
        self._set(slot, clip_ratio)
        if self.settings.schedule == "paper":  # as published: the whole model, every time
            hidden = self.runner.suffix(0, self.runner.embed(self.ids))
        else:
            hidden = self.runner.suffix(slot.block, self._prefix.before(slot.block))
        return self._objective(hidden)


def _clipped(slot: S, fields: tuple[str, ...], clip_ratio: float) -> S:
    return replace(slot, **{f: replace(getattr(slot, f), clip_ratio=clip_ratio) for f in fields})
