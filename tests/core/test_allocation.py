"""The allocator against brute force and against a MILP solver, and what it says about bad input."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from paley.core import allocation
from paley.core.allocation import Allocation, Choice, allocate
from paley.core.errors import PaleyError

Items = dict[str, list[Choice]]


def random_items(
    seed: int, items: int, choices: int, resources: int = 1, *, largest: int = 30, decades: float = 3.0
) -> Items:
    """Losses that fall about as 4^-bits, slopes and sizes over some decades, and zero costs here and there."""
    rng = random.Random(seed)
    made: Items = {}
    for i in range(items):
        slope, size = 10 ** rng.uniform(-decades, 0), largest ** rng.uniform(0.5, 1)
        unused = rng.randrange(3 * resources) if resources > 1 else -1
        made[f"layer{i}"] = []
        for j in range(choices):
            bits = rng.uniform(0, 1)
            costs = tuple(0 if r == unused else round(size * bits * rng.uniform(0.8, 1)) for r in range(resources))
            made[f"layer{i}"].append(Choice(f"grid{j}", slope * 4 ** (-8 * bits) * rng.uniform(0.8, 1.2), costs))
    return made


def same_size_items(seed: int, items: int, choices: int, *, spread: float) -> Items:
    """The nasty case: layers of one size whose slopes hardly differ."""
    rng = random.Random(seed)
    bits = sorted(rng.uniform(1.5, 10) for _ in range(choices))
    slopes = [1 + spread * rng.gauss(0, 1) for _ in range(items)]
    return {
        f"layer{i}": [Choice(f"grid{j}", slope * 4**-b, (round(b * 1e9),)) for j, b in enumerate(bits)]
        for i, slope in enumerate(slopes)
    }


def middle_budgets(items: Items, share: float) -> list[int]:
    """For each resource: this share of the way from the least to the most that can be spent."""
    columns = [list(zip(*(c.costs for c in choices), strict=True)) for choices in items.values()]
    least = [sum(map(min, column)) for column in zip(*columns, strict=True)]
    most = [sum(map(max, column)) for column in zip(*columns, strict=True)]
    return [max(1, low + int(share * (high - low))) for low, high in zip(least, most, strict=True)]


def brute_force(items: Items, budgets: list[int]) -> float:
    """The least loss of all combinations; inf where none is within the budgets."""
    least = math.inf
    for picks in itertools.product(*items.values()):
        costs = [sum(column) for column in zip(*(c.costs for c in picks), strict=True)]
        if all(c <= b for c, b in zip(costs, budgets, strict=True)):
            least = min(least, math.fsum(c.loss for c in picks))
    return least


def by_milp(items: Items, budgets: list[int]) -> float:
    """The least loss by HiGHS, which meets a constraint to 1e-6 only: rows in whole units keep that below one."""
    optimize = pytest.importorskip("scipy.optimize")
    sparse = pytest.importorskip("scipy.sparse")
    flat = [choice for choices in items.values() for choice in choices]
    costs = np.array([c.costs for c in flat], dtype=float).T
    ones = sparse.block_diag([np.ones((1, len(choices))) for choices in items.values()])
    loss = np.array([c.loss for c in flat])
    result = optimize.milp(
        1e6 * loss / loss.max(),  # HiGHS stops at an absolute gap of 1e-6, whatever mip_rel_gap says
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(ones, 1, 1), optimize.LinearConstraint(costs, -np.inf, budgets)],
        options={"mip_rel_gap": 0.0, "time_limit": 60},
    )
    assert result.status == 0, result.message
    picked = np.round(result.x)
    assert (costs @ picked <= budgets).all()
    return float(loss @ picked)


def check(items: Items, budgets: list[int], found: Allocation) -> None:
    """What holds for every allocation: one choice of each item, honest sums, all budgets met."""
    assert list(found.choices) == list(items)
    assert all(choice in items[item] for item, choice in found.choices.items())
    assert found.loss == math.fsum(c.loss for c in found.choices.values())
    assert found.costs == tuple(map(sum, zip(*(c.costs for c in found.choices.values()), strict=True)))
    assert all(c <= b for c, b in zip(found.costs, budgets, strict=True))


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("largest", [6, 1000, 10**10])
def test_equals_brute_force(resources, largest):
    feasible = 0
    for seed in range(30):
        items = random_items(seed, 2 + seed % 4, 2 + seed % 3, resources, largest=largest)
        budgets = middle_budgets(items, random.Random(seed).uniform(0.0, 0.9))
        least = brute_force(items, budgets)
        if least == math.inf:
            with pytest.raises(PaleyError, match="meets all budgets at once"):
                allocate(items, budgets)
            continue
        found = allocate(items, budgets)
        check(items, budgets, found)
        assert found.loss == pytest.approx(least, rel=1e-12, abs=1e-300)
        feasible += 1
    assert feasible >= 10


def test_equals_brute_force_where_items_have_unlike_numbers_of_choices():
    items = random_items(5, 5, 4, 2)
    ragged = {name: choices[: 1 + i % 4] for i, (name, choices) in enumerate(items.items())}
    budgets = middle_budgets(ragged, 0.6)
    assert allocate(ragged, budgets).loss == pytest.approx(brute_force(ragged, budgets), rel=1e-12)


def test_a_narrow_search_widens_until_it_is_exact(monkeypatch):
    monkeypatch.setattr(allocation, "_WIDTHS", (1, 2, 4, 8, 16, 2**12))
    for seed in range(20):
        for resources in (1, 2):
            items = random_items(seed, 6, 4, resources, largest=10**6)
            budgets = middle_budgets(items, 0.5)
            assert allocate(items, budgets).loss == pytest.approx(brute_force(items, budgets), rel=1e-12)


@pytest.mark.parametrize(
    ("items", "share"),
    [
        (random_items(0, 400, 40, largest=10**5, decades=5), 0.2),
        (random_items(1, 60, 12, 2, largest=10**5), 0.4),
        (random_items(2, 60, 12, 2, largest=300), 0.3),
        (same_size_items(0, 40, 8, spread=1e-3), 0.2),
    ],
    ids=["large", "two resources", "two resources of small integers", "one size"],
)
def test_equals_a_milp_solver(items, share):
    budgets = middle_budgets(items, share)
    found = allocate(items, budgets)
    check(items, budgets, found)
    least = by_milp(items, budgets)
    assert found.loss == pytest.approx(least, rel=1e-9)


def test_layers_of_one_size_and_slope_merge_into_few_states():
    items = same_size_items(3, 300, 12, spread=0.0)
    budgets = middle_budgets(items, 0.25)
    found = allocate(items, budgets)
    check(items, budgets, found)
    mixes = []  # of two grids, as many layers as fit on the dearer one: no mix is better than what was found
    for a, b in itertools.combinations(items["layer0"], 2):
        more = min(len(items), (budgets[0] - len(items) * a.costs[0]) // (b.costs[0] - a.costs[0]))
        if more >= 0:
            mixes.append((len(items) - more) * a.loss + more * b.loss)
    assert found.loss <= min(mixes) * (1 + 1e-12)


def test_more_budget_never_loses_more():
    items = random_items(7, 30, 10, largest=10**9)
    low, high = middle_budgets(items, 0.0)[0], middle_budgets(items, 1.0)[0]
    points = [allocate(items, [low + (high - low) * k // 12]) for k in range(13)]
    for less, more in itertools.pairwise(points):
        assert more.loss <= less.loss * (1 + 1e-12)
    assert points[-1].loss == pytest.approx(sum(min(c.loss for c in choices) for choices in items.values()))


def test_the_order_of_items_and_the_run_change_nothing():
    items = random_items(11, 40, 8, 2, largest=10**6)
    budgets = middle_budgets(items, 0.4)
    found = allocate(items, budgets)
    assert allocate(items, budgets) == found
    for seed in range(3):
        names = list(items)
        random.Random(seed).shuffle(names)
        assert allocate({n: items[n] for n in names}, budgets).loss == pytest.approx(found.loss, rel=1e-12)


def test_of_equal_losses_the_cheaper_then_the_first_is_taken():
    equal = [Choice("dear", 1.0, (9,)), Choice("cheap", 1.0, (5,)), Choice("cheap too", 1.0, (5,))]
    found = allocate({"a": equal, "b": equal}, [20])
    assert [c.name for c in found.choices.values()] == ["cheap", "cheap"]
    either = [Choice("first", 1.0, (1, 2)), Choice("second", 1.0, (2, 1))]
    assert allocate({"a": either}, [5, 5]).choices["a"].name == "first"


def test_left_as_it_is_where_the_budget_allows():
    items = {n: [Choice("int4", 0.5, (4,)), Choice("as is", 0.0, (16,))] for n in ("q", "k", "v")}
    assert allocate(items, [10**30]).loss == 0.0
    assert allocate(items, [48]).costs == (48,)
    assert allocate(items, [47]).costs == (36,)
    assert allocate(items, [12]).loss == 1.5


def test_all_losses_zero_and_all_costs_zero():
    assert allocate({"a": [Choice("x", 0.0, (3,)), Choice("y", 0.0, (2,))]}, [3]).costs == (2,)
    assert allocate({"a": [Choice("x", 1.0, (0,)), Choice("y", 0.5, (0,))]}, [1]).loss == 0.5


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 301])
def test_states_that_another_beats_are_dropped(resources, n):
    generator = torch.Generator().manual_seed(n)
    loss = torch.randint(0, 40, (n,), generator=generator).double()
    costs = torch.randint(0, 40, (n, resources), generator=generator)
    kept = allocation._undominated(loss, costs).tolist()
    states = [(*c, x) for c, x in zip(costs.tolist(), loss.tolist(), strict=True)]
    assert [costs[i].tolist() for i in kept] == sorted(costs[i].tolist() for i in kept)
    assert len({tuple(costs[i].tolist()) for i in kept}) == len(kept)
    # Each state is kept or stands behind a kept one that is no worse in any respect.
    assert all(any(all(a <= b for a, b in zip(states[k], s, strict=True)) for k in kept) for s in states)
    if resources < 3:
        best = {s for s in states if not any(t != s and all(a <= b for a, b in zip(t, s, strict=True)) for t in states)}
        assert sorted(states[k] for k in kept) == sorted(best)


def test_a_search_too_wide_is_an_error_and_no_answer(monkeypatch):
    monkeypatch.setattr(allocation, "_WIDTHS", (2, 3))
    items = same_size_items(13, 40, 12, spread=1e-3)
    with pytest.raises(PaleyError, match=r"more than 3 states.*lies between .* and .*fewer or coarser choices"):
        allocate(items, middle_budgets(items, 0.3))


ONE = [Choice("int4", 0.5, (4,)), Choice("int8", 0.1, (8,))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: allocate({"q": ONE, "k": ONE}, [7], resources=["bits"]), r"bits is 7, below .* 8;.* 8 to 16"),
        (lambda: allocate({"q": ONE, "k": []}, [9]), "k: no choices"),
        (lambda: allocate({}, [9]), "no items"),
        (lambda: allocate({"q": ONE}, [0], resources=["bits"]), "budget of bits must be a positive int, got 0"),
        (lambda: allocate({"q": ONE}, [4.5]), "must be a positive int, got 4.5"),  # type: ignore[list-item]
        (lambda: allocate({"q": ONE}, []), "no budgets"),
        (lambda: allocate({"q": ONE}, [9], resources=["bits", "bytes"]), "1 budgets and 2 resource names"),
        (lambda: allocate({"q": ONE}, [9, 9]), "q, choice 'int4': 1 costs for 2 resources"),
        (lambda: allocate({"q": [*ONE, ONE[0]]}, [9]), "q: two choices are called 'int4'"),
        (lambda: allocate({"q": [Choice("x", 1.0, (2**53,))]}, [2**60]), "larger unit"),
        (lambda: Choice("x", math.nan, (1,)), "choice 'x': loss must be a finite number.*nan"),
        (lambda: Choice("x", math.inf, (1,)), "choice 'x': loss must be a finite number.*inf"),
        (lambda: Choice("x", -1.0, (1,)), "choice 'x': loss must be a finite number.*-1"),
        (lambda: Choice("x", 1.0, (-1,)), "choice 'x': a cost must be an int of at least 0, got -1"),
        (lambda: Choice("x", 1.0, (1.5,)), "got 1.5"),  # type: ignore[arg-type]
        (lambda: Choice("x", 1.0, (True,)), "got True"),
        (lambda: Choice("x", 1.0, ()), "costs must be a tuple"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(PaleyError, match=message):
        call()


def test_budgets_that_exclude_each_other_are_named():
    either = [Choice("small", 1.0, (1, 10)), Choice("fast", 1.0, (10, 1))]
    items = {f"layer{i}": either for i in range(4)}
    # Two thirds of a small layer would fit both, so the relaxation alone does not notice.
    for bits in (35, 22):
        with pytest.raises(PaleyError, match=f"with bytes within 10, bits is at least 40, and its budget is {bits}"):
            allocate(items, [bits, 10], resources=["bits", "bytes"])
    assert allocate(items, [31, 13]).costs == (31, 13)


def test_one_thread_or_more_give_the_same():
    items = random_items(17, 50, 10, largest=10**8)
    budgets = middle_budgets(items, 0.3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = allocate(items, budgets)
        torch.set_num_threads(2)
        assert allocate(items, budgets) == one
    finally:
        torch.set_num_threads(threads)
