"""The model card tells what is in the plan, and not what the recipe would allow."""

from __future__ import annotations

import pytest

from paley.pipeline import quantize
from tiny_models import higgs, save_tiny

TEXT = ["calibration.source=self", "calibration.sequences=2", "calibration.seq_len=16"]
ROTATIONS = {
    "inputs": ("higgs-3", [], "inputs in Hadamard blocks of up to 16, at run time"),
    "no weight is turned": ("higgs-3", ["rotate=none"], "none"),
    "cache": ("w16a16kv4", [], "queries and keys in Hadamard blocks of up to 12, at run time"),
    "both": (
        "w4a4kv4",
        [],
        "inputs in Hadamard blocks of up to 16 and queries and keys in Hadamard blocks of up to 12, at run time",
    ),
    "folded": ("rtn-w4a4kv4", ["rotate=folded"], "Hadamard of order 48"),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_rotation_is_that_of_the_plan(name, tmp_path, tiny_tokenizer):
    preset, settings, expected = ROTATIONS[name]
    model = save_tiny(tmp_path / "model", tiny_tokenizer, intermediate_size=64)
    out = quantize(model, higgs(*settings, *TEXT, name=preset), output=tmp_path / "out").output
    assert f"| rotation | {expected} |" in (out / "README.md").read_text()
