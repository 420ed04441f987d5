"""Drawing tokens from logits."""

from __future__ import annotations

import math

import pytest
import torch

from paley.core.errors import PaleyError
from paley.pipeline.sampling import Sampler, Sampling, log_probabilities

LOGITS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()[torch.tensor([2, 0, 4, 1, 3])]  # token 1 is the likeliest


def counts(draws: int = 2000, prompt: tuple[int, ...] = (), **settings) -> list[int]:
    """How often each token is drawn; each draw is the first of its text."""
    found = [0] * len(LOGITS)
    for seed in range(draws):
        found[Sampler(Sampling(seed=seed, **settings), prompt).choose(LOGITS)] += 1
    return found


def allowed(**settings) -> set[int]:
    return {token for token, count in enumerate(counts(300, **settings)) if count}


def test_temperature_0_takes_the_likeliest():
    assert allowed() == {1}
    assert allowed(temperature=1e-3, top_p=0.99, min_p=0.1) == {1}


def test_temperature_1_draws_by_the_chances():
    found = torch.tensor(counts(temperature=1.0)) / 2000
    torch.testing.assert_close(found, LOGITS.exp(), atol=0.035, rtol=0)  # 3 standard errors of .4


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.86}, {0, 1, 3, 4}),
        ({"min_p": 0.3}, {0, 1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of the three that are left, two have .82
    ],
)
def test_cuts_leave_the_likeliest(settings, tokens):
    assert allowed(temperature=1.0, **settings) == tokens


def test_a_seed_repeats_its_draws():
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, seed=seed), ())
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)


def test_repetition_is_punished_in_prompt_and_answer():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert sampler.choose(logits) == 1  # 2 / 2 < 1.5
    assert sampler.choose(logits) == 0  # both are punished now
    assert Sampler(Sampling(repetition_penalty=2.0), [0]).choose(logits[2:]) == 1  # -1 becomes -2
    assert torch.equal(logits, torch.tensor([2.0, 1.5, -1.0, -1.2]))


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.tensor([2.0, 1.5, 0.0])
    present = Sampler(Sampling(presence_penalty=1.0), [0, 0])
    assert [present.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    frequent = Sampler(Sampling(frequency_penalty=0.3), [0])
    assert [frequent.choose(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 or more"),
        ({"temperature": math.nan}, "temperature=nan: must be"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5: must be 0 or more and at most 1"),
        ({"top_k": -1}, "top_k=-1: must be 0 or more"),
        ({"top_k": 10**400}, "top_k=10+: must be 0 or more"),
        ({"temperature": math.inf}, "temperature=inf: must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be 0.01 or more"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(PaleyError, match=complaint):
        Sampling(**settings)


@pytest.mark.parametrize("logits", [[1.0, math.nan], [1.0, math.inf], [math.inf, -math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_none_are_refused(logits, temperature):
    with pytest.raises(PaleyError, match="NaN or infinite"):
        Sampler(Sampling(temperature=temperature), ()).choose(torch.tensor(logits))
    assert Sampler(Sampling(temperature=temperature), ()).choose(torch.tensor([-math.inf, 1.0])) == 1


def test_log_probabilities_are_the_models_own():
    own, top = log_probabilities(LOGITS, 4, 2)
    assert own == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in top] == [1, 3]
    assert sum(math.exp(log) for _, log in log_probabilities(LOGITS, 0, 99)[1]) == pytest.approx(1)
