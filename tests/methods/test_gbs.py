import math

import pytest

from paley.core.errors import PaleyError
from paley.methods.gbs import bracket_search, gradual_search, local_search


def valley(minimum, trials):
    def score(x):
        trials.append(x)
        return (x - minimum) ** 2

    return score


@pytest.mark.parametrize("minimum", [0.21, 0.5, 0.62, 0.9])
def test_bracket_finds_a_planted_minimum(minimum):
    found = bracket_search(valley(minimum, []), iterations=10)
    assert abs(found.clip_ratio - minimum) < 0.07


def test_bracket_follows_the_published_order():
    trials = []
    bracket_search(valley(0.3, trials), iterations=4)
    # .5; left half .25 wins and moves the bracket to (0, .5); right of .25 is .375; left (0..25): .125; ...
    assert trials == [0.5, 0.25, 0.375, 0.125, 0.3125]


@pytest.mark.parametrize("minimum", [0.31, 0.62, 0.95, 1.2])
def test_local_finds_a_planted_minimum(minimum):
    found = local_search(valley(minimum, []), [0.9, 0.6, 1.0], iterations=12)
    assert abs(found.clip_ratio - minimum) < 0.03


def test_local_is_never_worse_than_a_start_and_repeats_no_trial():
    trials = []
    noisy = [0.3, 0.1, 0.2]
    found = local_search(lambda x: trials.append(x) or noisy[len(trials) % 3], [0.9, 0.8, 0.9], iterations=7)
    assert len(trials) == len(set(trials)) == 9
    assert found.loss == 0.1


def test_local_does_not_follow_noise():
    found = local_search(lambda x: 1.0 - 0.0015 * (x != 0.9), [0.9, 0.8], iterations=9)
    assert found.clip_ratio == 0.9


def test_local_tries_only_the_starts_when_told_so():
    trials = []
    found = local_search(valley(0.5, trials), [0.9, 0.7], iterations=0)
    assert trials == [0.9, 0.7]
    assert found.clip_ratio == 0.7


def test_gradual_settles_each_slot_before_the_next():
    settled = {}
    best = {"a": 0.4, "b": 0.7}

    def evaluate(slot, clip_ratio):
        # b's best place depends on a being settled at its own.
        return (clip_ratio - best[slot]) ** 2 + (slot == "b" and abs(settled["a"].clip_ratio - 0.4))

    outcomes = gradual_search(
        ["a", "b"], evaluate, settled.__setitem__, lambda slot, score: local_search(score, [0.9], 20)
    )
    assert list(outcomes) == ["a", "b"]
    assert settled == outcomes
    assert abs(outcomes["b"].clip_ratio - 0.7) < 0.03


def test_nan_is_named():
    with pytest.raises(PaleyError, match=r"layers\.3\.keys.*NaN"):
        gradual_search(
            ["layers.3.keys"],
            lambda slot, clip: math.nan,
            lambda slot, outcome: None,
            lambda slot, score: bracket_search(score),
        )
