"""A quantized folder in MLX's format `affine`, which mlx-lm reads: w = scale · code + bias, also embedding and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.arch import Site
from paley.core.grids import Grid
from paley.core.schemes import WeightScheme
from paley.export.folder import Exported
from paley.export.recode import groups_of, recode, whole_bits, words
from paley.format import spec
from paley.format.checkpoint import Checkpoint

__all__ = ["export_mlx"]

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


class _Affine:
    to, name = "mlx", "MLX"
    way_out = "quantize with a preset that it holds, such as --preset mlx-4, or export it --to plain"
    usage = "```\nmlx_lm.generate --model THIS_FOLDER --prompt Hello\n```"

    def why_not(self, site: Site, weight: WeightScheme) -> str | None:
        if site.experts:
            return "stacks of experts are named in another way there, which Paley does not write"
        if whole_bits(weight) not in _BITS:
            return f"holds evenly spaced grids of {', '.join(map(str, _BITS))} bits, got {weight.grid.name!r}"
        if weight.group_size not in _GROUPS:
            return f"holds groups of {', '.join(map(str, _GROUPS))} columns, got group_size={weight.group_size}"
        return None

    def tensors(self, site: Site, weight: WeightScheme, stored: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        name, grid = site.name, weight.grid
        assert isinstance(grid, Grid)
        scales = stored.tensor(name + spec.SCALES)
        start = float(grid.points[0]) - (stored.tensor(name + spec.ZEROS).float() if grid.affine else 0.0)
        yield f"{name}.weight", words(stored.tensor(name + spec.CODES)).view(torch.uint32)
        yield f"{name}.scales", scales
        yield f"{name}.biases", (scales.float() * start).half()

    def section(self, weights: Mapping[str, WeightScheme], kept: list[str]) -> dict[str, Any]:
        """The most common bits and group size, and each weight that has others; false: unquantized."""
        found = groups_of(weights)
        bits, group_size = found.most_common(1)[0][0] if found else (4, 64)
        own: dict[str, Any] = {
            name: {"group_size": weight.group_size, "bits": whole_bits(weight)}
            for name, weight in weights.items()
            if (whole_bits(weight), weight.group_size) != (bits, group_size)
        }
        section = {"group_size": group_size, "bits": bits, "mode": "affine"} | own | dict.fromkeys(kept, False)
        return {"quantization": section, "quantization_config": section}

    def notes(self, dtype: str) -> list[str]:
        return ["biases of grids with a zero point are rounded to float16, by at most 2^-11 of one"]


def export_mlx(
    path: str | Path,
    *,
    output: str | Path,
    weights_only: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` for MLX to the new folder `output`.

    weights_only: leave out the rounding of linear inputs, keys and values. on_tensor hears of each tensor written.
    Errors: PaleyError, with nothing in `output`.
    """
    return recode(_Affine(), path, output=output, weights_only=weights_only, overwrite=overwrite, on_tensor=on_tensor)
