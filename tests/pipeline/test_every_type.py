"""Types without a row, by walking their modules: what is saved and loaded again is what was quantized in memory."""

from __future__ import annotations

import pytest

from every_type import RECIPES, TYPES, compared, save_type

# Of each kind one: stacks of experts, a turned linear, a tied head with a bias, latent keys, layers with states.
SHARE = ("afmoe", "gpt2", "camembert", "deepseek_v3", "bamba")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in SHARE else pytest.mark.long) for k in TYPES])
def test_a_loaded_model_is_the_one_in_memory(kind, name, tmp_path):
    try:
        save_type(kind, tmp_path / "model")
    except Exception as error:  # what a config class demands is its own
        pytest.skip(f"no tiny model can be built: {type(error).__name__}")
    apart, lost, weights = compared(tmp_path / "model", name, tmp_path / "out")
    assert weights >= 3
    assert apart < 1e-3  # float32 products in another order
    assert lost < 0.9
