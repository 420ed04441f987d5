"""Random inputs of `planes_matmul`, for the tests of its meaning and of what runs it."""

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
