"""Activations, transformed and rounded: by native kernels if they take them, else by the torch code of `core`.

Both give the same bits. Gradients flow through the torch code alone, so it serves all that wants them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paley import kernels
from paley.core import rounding
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme
from paley.core.transforms import Transform
from paley.kernels import rounding as kernel

__all__ = ["encode", "round_trip"]


def round_trip(
    x: Tensor, scheme: ActivationScheme | None, transform: Transform | None = None, diagonal: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x [..., in] -> T x rounded (unless scheme is None) as `core.rounding.round_trip` does, [..., out], in x's dtype.

    diagonal: [in], what x is divided by first; it needs a transform.
    """
    if scheme is None and transform is None:
        return x
    if _native(x, scheme):
        return kernel.round_trip(x, scheme, transform, diagonal, scale_dtype)
    x = _turn(x, transform, diagonal)
    return x if scheme is None else rounding.round_trip(x.contiguous(), scheme, scale_dtype)


def encode(
    x: Tensor, scheme: ActivationScheme, transform: Transform | None = None, diagonal: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:  # fmt: skip
    """As `round_trip`, but to codes and scales, as `core.rounding.quantize_dynamic` does."""
    if scheme.grid.size <= 2**8 and _native(x, scheme):
        return kernel.encode(x, scheme, transform, diagonal, scale_dtype)
    return rounding.quantize_dynamic(_turn(x, transform, diagonal).contiguous(), scheme, scale_dtype)


def _turn(x: Tensor, transform: Transform | None, diagonal: Tensor | None = None) -> Tensor:
    if transform is None:
        return x
    return transform.apply(x if diagonal is None else x / diagonal.to(x.dtype))


def _native(x: Tensor, scheme: ActivationScheme | None) -> bool:
    return kernels.backend() == "native" and kernel.takes(x, scheme)
