"""A quantized folder in compressed-tensors' format, `pack-quantized`, which transformers and vLLM read.

A value is scale · (code - 2^(bits-1)): `int` grids. The words are Paley's own bytes. Zero points have a place too,
but transformers does not load them: compressed-tensors gives the empty model an unpacked tensor for packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.arch import Site
from paley.core.schemes import WeightScheme
from paley.export.folder import Exported
from paley.export.recode import groups_of, recode, whole_bits, words
from paley.format import spec
from paley.format.checkpoint import Checkpoint

__all__ = ["export_compressed_tensors"]

_LAYOUT = "0.20.1"  # since then 3, 5, 6 and 7 bits run across words


class _PackQuantized:
    to, name = "compressed-tensors", "compressed-tensors"
    way_out = "quantize with a preset that it holds, such as --preset ct-w4g128, or export it --to plain"
    usage = """\
```python
from transformers import AutoModelForCausalLM  # pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

vLLM takes folders of this format; that it reads this one was not tried."""

    def why_not(self, site: Site, weight: WeightScheme) -> str | None:
        if site.kind != "linear":
            return f"embedding and head stay unquantized there, got grid {weight.grid.name!r}"
        if site.experts:
            return "stacks of experts are one tensor each there, which Paley does not write"
        if whole_bits(weight) is None or not weight.grid.name.startswith("int"):
            return f"holds grids int2 to int8, got {weight.grid.name!r}"
        return None

    def tensors(self, site: Site, weight: WeightScheme, stored: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        name = site.name
        yield f"{name}.weight_packed", words(stored.tensor(name + spec.CODES))
        yield f"{name}.weight_scale", stored.tensor(name + spec.SCALES)
        yield f"{name}.weight_shape", torch.tensor(site.shape)

    def section(self, weights: Mapping[str, WeightScheme], kept: list[str]) -> dict[str, Any]:
        found = groups_of(weights)
        groups = {}
        for index, key in enumerate(found):
            bits, group_size = key
            names = [name for name, weight in weights.items() if groups_of({name: weight}) == {key: 1}]
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(found) == 1 else names,
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                    "strategy": "channel" if group_size is None else "group", "group_size": group_size,
                },
                "input_activations": None, "output_activations": None, "format": "pack-quantized",
            }  # fmt: skip
        section = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": kept, "kv_cache_scheme": None, "version": _LAYOUT,
        }  # fmt: skip
        return {"quantization_config": section}

    def notes(self, dtype: str) -> list[str]:
        if dtype != "bfloat16":
            return []
        return ["scales are float16, and readers cast them to the model's bfloat16; load with dtype=float16 or float32"]


def export_compressed_tensors(
    path: str | Path,
    *,
    output: str | Path,
    weights_only: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` for compressed-tensors to the new folder `output`.

    weights_only: leave out the rounding of linear inputs, keys and values. on_tensor hears of each tensor written.
    Errors: PaleyError, with nothing in `output`.
    """
    return recode(
        _PackQuantized(), path, output=output, weights_only=weights_only, overwrite=overwrite, on_tensor=on_tensor
    )
