"""Types without a row, by walking their modules: what is saved and loaded again is what was quantized in memory."""

from __future__ import annotations

import json

import pytest
import transformers

from every_type import GPTQ, OUTCOMES, RECIPES, TYPES, judged

# Of each kind one: stacks of experts, a turned linear, a tied head with a bias, latent keys, layers with states.
SHARE = ("afmoe", "gpt2", "camembert", "deepseek_v3", "bamba")
KNOWN = json.loads(OUTCOMES.read_text())


@pytest.mark.parametrize("name", [*RECIPES, GPTQ])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in SHARE else pytest.mark.long) for k in TYPES])
def test_a_loaded_model_is_the_one_in_memory(kind, name, tmp_path):
    """What does not work is listed with its reason, and one that begins to work is noticed."""
    known = KNOWN["types"].get(kind, {}).get(name, "works")
    if known != "works" and f"transformers {transformers.__version__}" != KNOWN["of"]:
        pytest.skip(f"{known}, in {KNOWN['of']}")
    found = judged(kind, name, tmp_path)
    assert found.partition(":")[0] == known.partition(":")[0], f"{found}; is python -m bench.every_type to be run?"


def test_nearly_all_types_that_can_be_built_work():
    found = [all(each[name] == "works" for name in RECIPES) for each in built().values()]
    assert sum(found) >= 0.95 * len(found)
    assert KNOWN["types"].keys() >= set(TYPES) or f"transformers {transformers.__version__}" != KNOWN["of"]


def built() -> dict[str, dict[str, str]]:
    return {k: f for k, f in KNOWN["types"].items() if not any(h.startswith("cannot be built") for h in f.values())}
