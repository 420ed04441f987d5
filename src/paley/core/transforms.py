"""Isometries T: R^in -> R^out with T^T T = I, so that W x = (W T^T)(T x).

A rotation has out_dim = in_dim; an expansion pads with zeros first, then rotates in the wider space
(dimension expansion, arXiv:2504.13989, section 4).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paley.core import hadamard
from paley.core.errors import PaleyError

__all__ = ["Transform", "random_signs"]

_MASK = (1 << 64) - 1


@functools.lru_cache(maxsize=64)
def random_signs(n: int, seed: int) -> Tensor:
    """n signs +-1, float64 [n], from the bits of SplitMix64: the same on every machine. Shared: do not write to it."""
    signs, state = [], seed & _MASK
    while len(signs) < n:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
        signs.extend(1.0 if z >> bit & 1 else -1.0 for bit in range(64))
    return torch.tensor(signs[:n], dtype=torch.float64)


@dataclass(frozen=True)
class Transform:
    """Zero-pad in_dim to out_dim, flip signs drawn from `seed` (None: none), then H/sqrt(order) in blocks.

    `order` must divide out_dim and be reachable as a Hadamard order.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    in_dim: int
    out_dim: int
    order: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.in_dim <= self.out_dim:
            raise PaleyError(f"transform: needs 1 <= in_dim <= out_dim, got {self.in_dim} -> {self.out_dim}")
        if self.order < 1 or self.out_dim % self.order:
            raise PaleyError(f"transform: order={self.order} does not divide out_dim={self.out_dim}")
        hadamard.factor(self.order)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., in_dim] -> T x [..., out_dim], in x's dtype."""
        if x.shape[-1] != self.in_dim:
            raise PaleyError(f"transform: last dimension is {x.shape[-1]}, expected in_dim={self.in_dim}")
        if self.out_dim > self.in_dim:
            x = torch.nn.functional.pad(x, (0, self.out_dim - self.in_dim))
        if self.seed is not None:
            x = x * random_signs(self.out_dim, self.seed).to(x)
        return hadamard.transform(x, self.order)

    def adjoint(self, y: Tensor) -> Tensor:
        """y [..., out_dim] -> T^T y [..., in_dim]; undoes `apply`."""
        if y.shape[-1] != self.out_dim:
            raise PaleyError(f"transform: last dimension is {y.shape[-1]}, expected out_dim={self.out_dim}")
        x = hadamard.transform(y, self.order, inverse=True)
        if self.seed is not None:
            x = x.mul_(random_signs(self.out_dim, self.seed).to(x))
        return x[..., : self.in_dim]
