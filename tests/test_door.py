"""The public door: `import paley`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import paley


def test_every_promised_name_is_there():
    assert all(hasattr(paley, name) for name in paley.__all__)


def test_the_version_is_that_of_pyproject():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert paley.__version__ == pyproject["project"]["version"]


def test_hadamard_is_the_function():
    h = paley.hadamard(12).int()
    assert torch.equal(h @ h.T, 12 * torch.eye(12, dtype=torch.int32))


def test_importing_registers_the_format():
    assert AUTO_QUANTIZER_MAPPING["paley"] is paley.hf.PaleyQuantizer


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("w9a4", "W9 has no grid"),
        ("no.yaml", "no such recipe"),
        (Path("no"), "no such recipe"),
        (None, "recipe or a plan"),
    ],
)
def test_a_recipe_may_be_a_name_or_a_file(tmp_path, recipe, complaint):
    with pytest.raises(paley.PaleyError, match=complaint):
        paley.quantize(tmp_path, recipe, output=tmp_path / "out")
