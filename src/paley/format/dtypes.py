"""The types in which unquantized tensors are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core.errors import PaleyError, Setting
from paley.format.checkpoint import first_not_finite

__all__ = ["FLOATS", "cast_to_store"]

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # as config.json calls them


def cast_to_store(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An unquantized tensor in the type that it is stored in; PaleyError if the type cannot hold its values."""
    stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if stored is not tensor and first_not_finite(stored) is not None:
        raise PaleyError(
            f"its largest value {float(tensor.abs().max()):.3g} does not fit {dtype}",
            where=name,
            remedy=("set ", Setting("dtype", "float32"), " or ", Setting("dtype", "bfloat16")),
        )
    return stored
