"""Random inputs of `planes_matmul`, and its formula written literally: the oracle of the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def example(tokens: int, out: int, groups: int, group_size: int, seed: int = 0) -> tuple[Tensor, ...]:
    """x_codes, x_scales, x_zeros, codes, centroids of random numbers."""
    g = torch.Generator().manual_seed(seed)
    return (
        integers(0, 16, tokens, groups * group_size, seed=seed).to(torch.uint8),
        torch.rand(tokens, groups, generator=g),
        integers(0, 16, tokens, groups, seed=seed + 1).to(torch.uint8),
        integers(0, 4, out, groups * group_size, seed=seed + 2).to(torch.uint8),
        torch.randn(out, groups, 4, generator=g).half(),
    )


def bit_planes(codes: Tensor, bits: int = 4) -> Tensor:
    """codes uint8 [...] -> bool [bits, ...]: bit a of each code, so that codes = Σ 2^a · planes[a]."""
    return torch.stack([(codes >> a & 1).bool() for a in range(bits)])


def plane_sums(x_codes: Tensor, codes: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_codes uint8 [tokens, n], codes uint8 [out, n] -> int64 [tokens, out, groups] for the maps S, Q and S & Q.

    Each is Σ_a 2^a · popcount(X_a & map) over a group's columns, the sum of the codes where the map has a bit.
    """
    planes = bit_planes(x_codes).unflatten(2, (groups, -1))
    q, s = bit_planes(codes, 2).unflatten(2, (groups, -1))
    S, Q, both = (
        sum((((x[:, None] & m).sum(-1)) << a for a, x in enumerate(planes)), torch.tensor(0)) for m in (s, q, s & q)
    )
    return S, Q, both


def binary_arithmetic(
    x_codes: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor,
    codes: Tensor,
    centroids: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """As `planes.matmul`, by the formula of core/planes.py: integer sums, then `dtype` -> dtype [tokens, out]."""
    groups = x_scales.shape[1]
    S, Q, both = (x.to(dtype) for x in plane_sums(x_codes, codes, groups))
    every = x_codes.unflatten(1, (groups, -1)).sum(-1)[:, None].to(dtype)  # Σ_a 2^a P(X_a), one for all rows
    c = centroids.to(dtype)
    c0, c1, c2, c3 = c.unbind(-1)
    total = c.gather(2, codes.unflatten(1, (groups, -1)).long()).sum(-1)  # Σ w, [out, groups]
    part = c0 * every + (c2 - c0) * S + (c1 - c0) * Q + (c3 - c2 - c1 + c0) * both
    return ((part - x_zeros[:, None].to(dtype) * total) * x_scales[:, None].to(dtype)).sum(-1)
