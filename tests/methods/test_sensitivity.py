"""Slopes of a planted quadratic are found within their error bars, with no more trials than the ranking needs."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from paley.core.errors import PaleyError
from paley.methods.sensitivity import (
    MAX_T,
    Slope,
    clamp_slopes,
    fit_slope,
    level_order,
    measure_slopes,
    noise_levels,
    rank_shifts,
)

PLANTED = {f"slot {i}": 1.5**i for i in range(12)}


def planted(noise: float, seed: int = 0):
    """delta = alpha t^2 (1 + noise N(0, 1)), as a draw of weight noise scatters; and the calls made."""
    calls: list[tuple[str, int]] = []

    def delta(slot: str, t: float, draw: int) -> float:
        calls.append((slot, draw))
        gauss = random.Random(f"{seed} {slot} {draw}").gauss(0, 1)
        return PLANTED[slot] * t * t * (1 + noise * gauss)

    return delta, calls


def test_levels_are_even_in_t_up_to_the_linear_range():
    times = noise_levels(15)
    assert times[-1] ** 2 == pytest.approx(4**-1.7)
    assert [b - a for a, b in itertools.pairwise([0.0, *times])] == pytest.approx([MAX_T / 15] * 15)


@pytest.mark.parametrize("count", [3, 4, 7, 15, 16])
def test_any_prefix_of_the_order_is_spread(count):
    order = level_order(count)
    assert sorted(order) == list(range(count))
    assert order[0] == count - 1
    quarter = sorted([-1, *order[: max(2, -(-count // 4))]])
    assert max(b - a for a, b in itertools.pairwise(quarter)) <= -(-count // 2)


def test_a_line_without_noise_is_exact():
    slope = fit_slope([(t * t, 2.5 * t * t) for t in noise_levels()])
    assert slope.alpha == pytest.approx(2.5, rel=1e-12)
    assert slope.stderr < 1e-12


def test_the_error_is_the_jackknifes():
    levels = [(0.1, 0.3), (0.2, 0.5), (0.4, 1.3)]
    slope = fit_slope(levels)
    without = [fit_slope([p for p in levels if p is not left]).alpha for left in levels]
    assert slope.stderr == pytest.approx(math.sqrt(sum((a - slope.alpha) ** 2 for a in without)))


@pytest.mark.parametrize("count", [4, 15])
def test_error_bars_hold(count):
    """Noise that grows with t, as it does in a model: two standard errors hold the truth nearly always."""
    rng, hits, squares = random.Random(0), 0, []
    for _ in range(2000):
        levels = [(t * t, t * t * (1 + 0.2 * rng.gauss(0, 1))) for t in noise_levels(count)]
        slope = fit_slope(levels)
        hits += abs(slope.alpha - 1) <= 2 * slope.stderr
        squares.append((slope.alpha - 1) ** 2)
    assert hits / 2000 > (0.8 if count == 4 else 0.9)
    assert math.sqrt(sum(squares) / 2000) < 0.2


def test_planted_slopes_are_found():
    slopes = measure_slopes(list(PLANTED), planted(0.1)[0], agreement=None)
    for name, alpha in PLANTED.items():
        assert slopes[name].alpha == pytest.approx(alpha, abs=3 * slopes[name].stderr)
        assert slopes[name].alpha == pytest.approx(alpha, rel=0.15)
        assert len(slopes[name].levels) == 15
        assert not slopes[name].clamped


def test_a_settled_ranking_costs_a_quarter():
    delta, calls = planted(0.01)
    rounds: list[int] = []
    slopes = measure_slopes(list(PLANTED), delta, on_round=lambda trials: rounds.append(len(trials)))
    assert rounds == [4 * len(PLANTED)]
    assert len(calls) == len(set(calls)) == 4 * len(PLANTED)
    assert sorted(slopes, key=lambda name: slopes[name].alpha) == list(PLANTED)


def test_close_slopes_are_measured_further_and_only_they(monkeypatch):
    monkeypatch.setitem(PLANTED, "slot 5", PLANTED["slot 6"] * 1.001)
    delta, calls = planted(0.05)
    rounds: list[int] = []
    slopes = measure_slopes(list(PLANTED), delta, agreement=0.9995, on_round=lambda trials: rounds.append(len(trials)))
    assert len(slopes["slot 5"].levels) == len(slopes["slot 6"].levels) == 15
    assert len(slopes["slot 0"].levels) == len(slopes["slot 11"].levels) == 4
    assert sum(rounds) == len(calls) == sum(len(slope.levels) for slope in slopes.values())


def test_rank_shifts_are_those_of_the_slopes_that_may_swap():
    close = [Slope(alpha, stderr, ()) for alpha, stderr in ((1, 0.1), (1.01, 0.1), (9, 0.1), (20, 0.1))]
    shifts = rank_shifts(close).tolist()
    assert shifts[:2] == pytest.approx([0.47, 0.47], abs=0.08)  # swapped in nearly half of the draws
    assert shifts[2:] == [0, 0]


def test_a_slope_that_is_not_positive_is_small_and_flagged():
    slopes = clamp_slopes({"a": Slope(2.0, 0.1, ()), "b": Slope(-1.0, 0.1, ()), "c": Slope(1e-9, 0.1, ())})
    assert slopes["b"].clamped
    assert 0 < slopes["b"].alpha <= slopes["c"].alpha
    assert not slopes["a"].clamped
    assert not slopes["c"].clamped
    assert clamp_slopes({"a": Slope(2.0, 0.1, ()), "b": Slope(0.0, 0.1, ())})["b"].alpha == pytest.approx(2e-4)
    with pytest.raises(PaleyError, match="none of the 1 slopes is positive"):
        clamp_slopes({"a": Slope(-2.0, 0.1, ())})


def test_one_slot_is_settled_at_once():
    assert len(measure_slopes(["slot 3"], planted(0.5)[0])["slot 3"].levels) == 4


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_names_slot_and_level(value):
    def overflows(slot: str, t: float, draw: int) -> float:
        return value if slot == "b" and draw > 10 else t * t

    with pytest.raises(PaleyError, match=r"b: .* level 15 of 15 \(t=0\.308\) .* only strong noise"):
        measure_slopes(["a", "b"], overflows)
    with pytest.raises(PaleyError, match=r"a: .* not finite at the lowest level either"):
        measure_slopes(["a", "b"], lambda slot, t, draw: value)


def test_too_few_levels():
    with pytest.raises(PaleyError, match="at least 3 noise levels for an error bar, got 2"):
        measure_slopes(["a"], lambda slot, t, draw: 1.0, levels=2)
