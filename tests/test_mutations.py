"""A share of the damage that bench/mutations.py does to finished folders."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from paley.pipeline import quantize
from tiny_models import change_tensors, higgs, save_tiny

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # last: both folders have an every_type


def test_no_damaged_folder_loads_as_garbage(tmp_path, tiny_tokenizer):
    import mutations

    model, other = (save_tiny(tmp_path / name, tiny_tokenizer) for name in ("model", "other"))
    change_tensors(other, lambda tensors: {name: torch.randn_like(t) / 4 for name, t in tensors.items()})
    settings = ["inputs={grid: int8}", "keys={grid: int4}", "values={grid: int4}"]
    out, mixed = (quantize(m, higgs(*settings), output=tmp_path / f"{m.name}.out").output for m in (model, other))
    outcomes, failures = mutations.run(out, mixed, 20, 7)
    assert not failures
    assert outcomes["refused"] > 5
    assert outcomes["loads as before, named by verify"] > 2
