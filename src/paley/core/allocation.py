"""Allocation: the best grid for every site under budgets, exactly.

By the linearity theorem (HIGGS, arXiv:2411.17525, section 5) the loss of a quantized model is a sum over its sites.
The best allocation is then a multiple-choice knapsack: take one choice of every item, stay within each budget, and
minimize the loss. Lagrangian multipliers give a lower bound. Dynamic programming then visits everything that the bound
does not rule out. It guesses `delta`, keeps each partial allocation whose bound is at most lower bound + delta, and
drops one only if another costs no more and loses no more. A loss found within delta of the bound is the least of all.
If none is found, the least lies above, and delta grows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["Allocation", "Choice", "allocate"]

_WIDTHS = (2**11, 2**15, 2**18)  # states kept at a step; a narrow search loses some, but still finds a good delta
_QUANTILES = 8  # cuts in each direction: more prune better and cost more
_ROUNDING = 1e-12  # of the sums in a bound: sums of thousands of float64 stay below it
_LARGEST = 2**53  # integers are exact in float64 up to here


@dataclass(frozen=True)
class Choice:
    """One way to treat an item: its loss, and its cost in each resource, a whole number."""

    name: str
    loss: float
    costs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.loss, (int, float)) or not 0 <= self.loss < math.inf:
            raise PaleyError(f"choice {self.name!r}: loss must be a finite number of at least 0, got {self.loss!r}")
        if not isinstance(self.costs, tuple) or not self.costs:
            raise PaleyError(f"choice {self.name!r}: costs must be a tuple, one a resource, got {self.costs!r}")
        for cost in self.costs:
            if type(cost) is not int or cost < 0:
                raise PaleyError(
                    f"choice {self.name!r}: a cost must be an int of at least 0, got {cost!r}; "
                    "count in a unit small enough, such as bits"
                )


@dataclass(frozen=True)
class Allocation:
    """choices {item: choice}, in the order of the items; loss and costs [resources] are their sums."""

    choices: Mapping[str, Choice]
    loss: float
    costs: tuple[int, ...]


def allocate(
    items: Mapping[str, Sequence[Choice]],
    budgets: Sequence[int],
    *,
    resources: Sequence[str] | None = None,
) -> Allocation:
    """The choice of each item with the least sum of losses whose costs are at most `budgets` [resources].

    resources: their names, for messages. The loss is the least possible, up to float64 rounding. The same input gives
    the same answer. Of equal losses, the one that costs less of the first resource wins, then of the second, and so on.
    Errors: PaleyError if no allocation is within the budgets.
    """
    names = tuple(resources) if resources is not None else tuple(f"resource {r}" for r in range(len(budgets)))
    if not len(budgets):
        raise PaleyError("allocation: no budgets; give one a resource")
    if len(names) != len(budgets):
        raise PaleyError(f"allocation: {len(budgets)} budgets and {len(names)} resource names; give one name a budget")
    _check_items(items, names)
    _check_budgets(items, budgets, names)
    options = list(items.values())
    picks = _Knapsack(options, budgets, names).solve()
    choices = {item: options[i][j] for i, (item, j) in enumerate(zip(items, picks, strict=True))}
    loss = math.fsum(choice.loss for choice in choices.values())
    costs = tuple(map(sum, zip(*(choice.costs for choice in choices.values()), strict=True)))
    return Allocation(choices, loss, costs)


def _check_items(items: Mapping[str, Sequence[Choice]], resources: tuple[str, ...]) -> None:
    if not items:
        raise PaleyError("allocation: no items; give at least one site with its choices")
    for item, choices in items.items():
        if not choices:
            raise PaleyError(f"{item}: no choices; give at least one, such as leaving the site as it is")
        twice = [name for name, times in Counter(choice.name for choice in choices).items() if times > 1]
        if twice:
            raise PaleyError(f"{item}: two choices are called {twice[0]!r}; give each its own name")
        for choice in choices:
            if len(choice.costs) != len(resources):
                raise PaleyError(
                    f"{item}, choice {choice.name!r}: {len(choice.costs)} costs for {len(resources)} resources "
                    f"({', '.join(resources)}); give one a budget, 0 if it uses nothing"
                )


def _check_budgets(items: Mapping[str, Sequence[Choice]], budgets: Sequence[int], resources: tuple[str, ...]) -> None:
    for r, (budget, resource) in enumerate(zip(budgets, resources, strict=True)):
        if type(budget) is not int or budget <= 0:
            raise PaleyError(f"allocation: the budget of {resource} must be a positive int, got {budget!r}")
        least = sum(min(choice.costs[r] for choice in choices) for choices in items.values())
        most = sum(max(choice.costs[r] for choice in choices) for choices in items.values())
        if most >= _LARGEST:
            raise PaleyError(f"allocation: costs of {resource} add up to {most}, beyond 2^53; count in a larger unit")
        if budget < least:
            raise PaleyError(
                f"allocation: the budget of {resource} is {budget}, below the smallest possible {least}; "
                f"within reach are {least} to {most}; raise it or offer cheaper choices"
            )


@dataclass(frozen=True)
class _Dual:
    """multipliers [resources] >= 0, their lower bound on the loss, and a slope [resources] of the bound there."""

    value: float
    multipliers: tuple[float, ...]
    slope: tuple[float, ...]


class _Knapsack:
    """The problem as tensors: loss [items, choices], costs [items, choices, resources], budget [resources].

    Costs are counted from each item's least, in units of their gcd. loss is inf for a choice that is missing, or that
    another choice matches or beats in every respect.
    """

    def __init__(self, options: Sequence[Sequence[Choice]], budgets: Sequence[int], resources: Sequence[str]) -> None:
        self.options, self.budgets, self.resources = options, budgets, resources
        shape = (len(options), max(map(len, options)))
        self.loss = torch.full(shape, math.inf, dtype=torch.float64)
        self.costs = torch.zeros(*shape, len(budgets), dtype=torch.int64)
        for i, choices in enumerate(options):
            self.loss[i, : len(choices)] = torch.tensor([c.loss for c in choices], dtype=torch.float64)
            costs = torch.tensor([c.costs for c in choices])
            self.costs[i, : len(choices)] = costs - costs.amin(0)
        self.loss.masked_fill_(_dominated_choices(self.loss, self.costs), math.inf)
        self.costs.masked_fill_(self.loss.isinf()[:, :, None], 0)
        budget = []
        for r, b in enumerate(budgets):
            unit = math.gcd(*self.costs[:, :, r].flatten().tolist()) or 1
            self.costs[:, :, r] //= unit
            room = b - sum(min(c.costs[r] for c in choices) for choices in options)
            budget.append(min(room // unit, int(self.costs[:, :, r].amax(1).sum())))
        self.budget = torch.tensor(budget)
        self.real, self.room = self.costs.double(), self.budget.double()
        self.largest = float(self.loss.masked_fill(self.loss.isinf(), 0).amax(1).sum())

    def solve(self) -> list[int]:
        """-> the choice of each item."""
        dual = self.ascend()
        delta, proven, width = self.first_delta(dual), 0.0, 0
        picks, best = None, math.inf
        while True:
            candidate, complete = self.search(dual, delta, _WIDTHS[width])
            if candidate is not None and self.loss_of(candidate) <= best:
                picks, best = candidate, self.loss_of(candidate)
            if complete:  # the search covered every allocation of a loss up to dual.value + delta
                proven = delta
            gap = best - dual.value
            if picks is not None and gap <= proven:
                return picks.tolist()
            lost = not complete and len(self.budgets) > 1
            if picks is None and (lost or (complete and dual.value + delta >= self.largest)):
                picks = self.witness()
                best = self.loss_of(picks)
            if complete:
                # The result of the search is close to the least; a witness may be far from it.
                delta, width = (gap if candidate is not None else min(2 * delta, gap)), 0
                continue
            width += 1
            if width == len(_WIDTHS):
                raise PaleyError(
                    f"allocation: more than {_WIDTHS[-1]} states at a step; the least loss lies between "
                    f"{dual.value + proven} and {best}; give fewer or coarser choices"
                )
            delta = min(delta, best - dual.value)

    def loss_of(self, picks: Tensor) -> float:
        return float(self.loss.gather(1, picks[:, None]).sum())

    def witness(self) -> Tensor:
        """Choices [items] within all budgets, or a PaleyError that names the budgets that exclude each other."""
        first, *others = self.resources
        options = [[Choice(c.name, float(c.costs[0]), c.costs[1:]) for c in choices] for choices in self.options]
        picks = _Knapsack(options, self.budgets[1:], others).solve()
        least = sum(choices[j].costs[0] for choices, j in zip(self.options, picks, strict=True))
        if least > self.budgets[0]:
            within = " and ".join(f"{name} within {b}" for name, b in zip(others, self.budgets[1:], strict=True))
            raise PaleyError(
                f"allocation: no allocation meets all budgets at once: with {within}, {first} is at least {least}, "
                f"and its budget is {self.budgets[0]}; raise one of them"
            )
        return torch.tensor(picks)

    def first_delta(self, dual: _Dual) -> float:
        """A delta that admits some dozens of deviations from the choices that the multipliers prefer."""
        priced = self.loss + self.real @ torch.tensor(dual.multipliers, dtype=torch.float64)
        reduced = priced - priced.amin(1, keepdim=True)
        reduced = reduced[(reduced > 0) & reduced.isfinite()]
        least = float(reduced.sort().values[:64][-1]) if len(reduced) else 0.0
        return max(least, _ROUNDING * self.largest)

    def ascend(self, fixed: tuple[float, ...] = ()) -> _Dual:
        """The greatest lower bound, with the multipliers of the last resources `fixed`.

        One resource after the other, each by cutting planes (Kelley, J. SIAM 8, 1960): the next multiplier is the one
        at which the tangents of the two nearest ones meet. This ends on the kink that is the maximum.
        """
        r = len(self.budgets) - len(fixed) - 1
        if r < 0:
            multipliers = torch.tensor(fixed, dtype=torch.float64)
            priced, picks = (self.loss + self.real @ multipliers).min(1)
            slope = self.real[torch.arange(len(picks)), picks].sum(0) - self.room
            return _Dual(float(priced.sum() - multipliers @ self.room), fixed, tuple(slope.tolist()))
        flat = _ROUNDING * max(1.0, float(self.room[r]))
        left = self.ascend((0.0, *fixed))
        if left.slope[r] <= flat or left.value > self.largest:
            return left
        x = 1e-3 * (self.largest or 1.0) / max(1.0, float(self.room[r]))
        right = self.ascend((x, *fixed))
        while right.slope[r] > flat:
            if right.value > self.largest:  # beyond every loss: nothing is within the budgets
                return right
            left, x = right, 8 * x
            right = self.ascend((x, *fixed))
        best = max(left, right, key=lambda dual: dual.value)
        for _ in range(100):
            low, high = left.multipliers[r], right.multipliers[r]
            fall = left.slope[r] - right.slope[r]
            x = (right.value - left.value + left.slope[r] * low - right.slope[r] * high) / fall
            if not low < x < high:
                break
            middle = self.ascend((x, *fixed))
            best = max(best, middle, key=lambda dual: dual.value)
            peak = left.value + left.slope[r] * (x - low)
            if middle.value >= peak - 1e-14 * abs(peak):
                break
            if middle.slope[r] > 0:
                left = middle
            else:
                right = middle
        share = right.slope[r] / (right.slope[r] - left.slope[r])  # the mix of both tangents that is flat along r
        slope = (share * a + (1 - share) * b for a, b in zip(left.slope, right.slope, strict=True))
        return _Dual(best.value, best.multipliers, tuple(slope))

    def cuts(self, dual: _Dual, delta: float) -> Tensor:
        """Multipliers [cuts, resources] for the bounds of parts: the best ones first, then some near them.

        Each resource's multiplier moves to a value at which a choice within delta becomes its item's preferred one.
        """
        best = torch.tensor(dual.multipliers, dtype=torch.float64)
        priced = self.loss + self.real @ best
        low, picks = priced.min(1, keepdim=True)
        reduced = priced - low
        far = self.real - self.real.gather(1, picks[:, :, None].expand(-1, 1, len(best)))
        levels = torch.arange(1, _QUANTILES + 1, dtype=torch.float64) / _QUANTILES
        cuts = [best]
        for r in range(len(best)):
            for sign in (1.0, -1.0):
                turns = (reduced <= delta) & (sign * far[:, :, r] < 0)
                if not turns.any():
                    continue
                moves = torch.quantile(reduced[turns] / far[:, :, r][turns].abs(), levels)
                moved = best.repeat(_QUANTILES, 1)
                moved[:, r] = (moved[:, r] + sign * moves).clamp(min=0)
                cuts.extend(moved)
        return torch.stack(cuts)

    def search(self, dual: _Dual, delta: float, width: int) -> tuple[Tensor | None, bool]:
        """-> (the best choices [items] of a loss up to dual.value + delta, whether all of them were visited)."""
        cuts = self.cuts(dual, delta)
        priced = self.loss[:, :, None] + self.real @ cuts.T
        low = priced.amin(1)
        ceiling = dual.value + delta + cuts @ self.room
        ceiling += _ROUNDING * (low.sum(0) + cuts @ self.room)
        is_open = (priced - low[:, None] <= ceiling - low.sum(0)).all(-1)
        if not is_open.any(1).all():
            return None, True
        picks = is_open.to(torch.int8).argmax(1)
        single = is_open.sum(1) == 1
        loss = torch.where(single, self.loss.gather(1, picks[:, None])[:, 0], 0).sum()[None]
        costs = (self.costs[torch.arange(len(picks)), picks] * single[:, None]).sum(0)[None]

        # Large steps first: the rest then fills the budgets almost as smoothly as its bound assumes.
        step = (self.real - self.real[torch.arange(len(picks)), picks][:, None]).abs() @ cuts[0]
        step = torch.where(is_open, step, 0).amax(1)
        order = [i for i in step.argsort(stable=True, descending=True).tolist() if not single[i]]
        least_priced = priced.masked_fill(~is_open[:, :, None], math.inf).amin(1)[order]
        least_costs = self.costs.masked_fill(~is_open[:, :, None], _LARGEST).amin(1)[order]
        limits, rooms = ceiling - _sums_after(least_priced), self.budget - _sums_after(least_costs)
        trail, complete, filtered = [], True, 32
        for item, limit, room in zip(order, limits, rooms, strict=True):
            choices = is_open[item].nonzero()[:, 0]
            loss = (loss[:, None] + self.loss[item, choices]).flatten()
            costs = (costs[:, None] + self.costs[item, choices]).flatten(0, 1)
            excess = _excess(loss, costs, cuts, limit)
            kept = ((excess <= 0) & (costs <= room).all(1)).nonzero()[:, 0]
            if len(kept) > 8 * width:
                kept, complete = _lowest(kept, excess, 8 * width), False
            if len(kept) > min(2 * filtered, width):
                kept = kept[_undominated(loss[kept], costs[kept])]
                filtered = max(32, len(kept))
            if len(kept) > width:
                kept, complete = _lowest(kept, excess, width), False
            if not complete:  # the proof is lost: look for a good allocation only, as cheaply as possible
                width = min(width, _WIDTHS[0])
            if not len(kept):
                return None, complete
            loss, costs = loss[kept], costs[kept]
            trail.append((item, choices, kept.int()))
        ties = (loss == loss.min()).nonzero()[:, 0].tolist()
        state = min(ties, key=lambda s: costs[s].tolist())
        for item, choices, kept in reversed(trail):
            state, j = divmod(int(kept[state]), len(choices))
            picks[item] = choices[j]
        return picks, complete


def _dominated_choices(loss: Tensor, costs: Tensor) -> Tensor:
    """loss [items, choices], costs [items, choices, resources] -> bool [items, choices]; of equals the first stays."""
    no_worse = (costs[:, :, None] <= costs[:, None]).all(-1) & (loss[:, :, None] <= loss[:, None])
    index = torch.arange(loss.shape[1])
    wins = no_worse & (~no_worse.transpose(1, 2) | (index[:, None] < index))
    return wins.any(1)


def _sums_after(x: Tensor) -> Tensor:
    """x [n, ...] -> the sum of the rows after each row."""
    sums = x.flip(0).cumsum(0).flip(0)
    return torch.cat([sums[1:], torch.zeros_like(sums[:1])])


def _excess(loss: Tensor, costs: Tensor, cuts: Tensor, limit: Tensor) -> Tensor:
    """loss [n], costs [n, resources], cuts [cuts, resources], limit [cuts] -> the excess [n] over the worst cut."""
    pieces = zip(loss.split(2**14), costs.split(2**14), strict=True)  # small enough to stay in the cache
    return torch.cat([(part @ cuts.T - limit).amax(1) + own for own, part in ((a, b.double()) for a, b in pieces)])


def _lowest(kept: Tensor, excess: Tensor, n: int) -> Tensor:
    """The n of `kept` with the lowest excess, in their order."""
    return kept[excess[kept].argsort(stable=True)[:n].sort().values]


def _undominated(loss: Tensor, costs: Tensor) -> Tensor:
    """loss [n], costs [n, resources] -> the states that no other beats, in ascending order of costs.

    Of states with equal costs the best stays. With three or more resources nothing else is dropped.
    """
    order = loss.argsort(stable=True)
    for r in reversed(range(costs.shape[1])):
        order = order[costs[order, r].argsort(stable=True)]
    if costs.shape[1] == 1:
        beaten = loss[order[1:]] >= loss[order].cummin(0).values[:-1]
    else:
        beaten = (costs[order[1:]] == costs[order[:-1]]).all(1)
    order = order[torch.cat([beaten.new_ones(1), ~beaten])]
    return order if costs.shape[1] != 2 else order[~_beaten(loss[order], costs[order, 1])]


def _beaten(loss: Tensor, cost: Tensor) -> Tensor:
    """loss and cost [n] -> bool [n]: some earlier state has no greater loss and no greater cost.

    By halves (Kung, Luccio and Preparata, J. ACM 22, 1975): at each level, every block of states is in order
    of cost. Its right half is compared with the least loss so far of its left half.
    """
    n = len(loss)
    size = 1 << (n - 1).bit_length()
    loss = torch.nn.functional.pad(loss, (0, size - n), value=math.inf)
    blocks = torch.cat([cost.argsort(stable=True), torch.arange(n, size)])[None]
    beaten = torch.zeros(size, dtype=torch.bool)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        right = (blocks & half) != 0
        own = loss[blocks]
        best = own.masked_fill(right, math.inf).cummin(1).values
        beaten[blocks[right & (own >= best)]] = True
        blocks = torch.stack([blocks[~right].view(-1, half), blocks[right].view(-1, half)], 1).view(-1, half)
    return beaten[:n]
