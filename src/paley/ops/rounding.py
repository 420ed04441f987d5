"""Activations, transformed and rounded: by native kernels if they take them, else by the torch code of `core`.

Both give the same bits. Gradients flow through the torch code alone, so it serves all that wants them; they pass a
rounding as if it were none (Bengio et al., arXiv:1308.3432), as its own are zero nearly everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paley import kernels
from paley.core import rounding
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme
from paley.core.transforms import Transform
from paley.kernels import rounding as kernel

__all__ = ["quantize_dynamic", "round_trip", "turn_back"]


def round_trip(
    x: Tensor, scheme: ActivationScheme | None, scale_dtype: torch.dtype = torch.float32, *,
    transform: Transform | None = None, diagonal: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., in] -> T (x / diagonal) [..., out], rounded as of `core.rounding` unless scheme is None, in x's dtype."""
    if scheme is None and transform is None and diagonal is None:
        return x
    native = _native(x, scheme)
    if native and x.dtype == torch.float32:
        return kernel.round_trip(x, scheme, scale_dtype, transform=transform, diagonal=diagonal)
    x = _turned(x, transform, diagonal)
    if scheme is None:
        return x
    if native:
        return kernel.round_trip(x.float(), scheme, scale_dtype).to(x.dtype)
    rounded = rounding.round_trip(x.detach().contiguous(), scheme, scale_dtype)
    return _Straight.apply(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


class _Straight(torch.autograd.Function):
    """x, rounded -> rounded; the gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def quantize_dynamic(
    x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float16, *,
    transform: Transform | None = None, diagonal: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """x [..., in] -> codes and scales of T (x / diagonal), as of `core.rounding`."""
    native = scheme.grid.size <= 2**8 and _native(x, scheme)
    if native and x.dtype == torch.float32:
        return kernel.quantize_dynamic(x, scheme, scale_dtype, transform=transform, diagonal=diagonal)
    x = _turned(x, transform, diagonal)
    quantize = kernel.quantize_dynamic if native else rounding.quantize_dynamic
    return quantize(x.float().contiguous(), scheme, scale_dtype)


def turn_back(x: Tensor, transform: Transform) -> Tensor:
    """x [..., out] -> Tᵀ x [..., in] in x's dtype, as of `Transform.adjoint`."""
    if x.dtype == torch.float32 and _native(x, None):
        return kernel.turn_back(x, transform)
    return transform.adjoint(x)


def _turned(x: Tensor, transform: Transform | None, diagonal: Tensor | None) -> Tensor:
    """x [..., in] -> T (x / diagonal) [..., out]: each step rounds its result to x's dtype."""
    x = x if diagonal is None else x / diagonal.to(x.dtype)
    if transform is None:
        return x
    if _native(x, None):
        return kernel.round_trip(x.float(), None, transform=transform).to(x.dtype)
    return transform.apply(x)


def _native(x: Tensor, scheme: ActivationScheme | None) -> bool:
    """Whether kernels round such values: in one pass if they are float32, else in steps as the torch code."""
    return kernels.backend() == "native" and kernel.takes(x, scheme)
