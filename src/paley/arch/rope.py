"""What llama3's scaling of RoPE divides each frequency by, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["llama3_factors"]


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """rope: the config's `rope_parameters` of type llama3 -> factors of the head_dim / 2 frequencies."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    half, factors = head_dim // 2, []
    for index in range(half):
        turns = context * rope["rope_theta"] ** (-index / half) / (2 * math.pi)  # in the first context
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return factors
