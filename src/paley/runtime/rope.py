"""RoPE's angles, from the settings in config.json, as transformers computes them (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["KINDS", "Rope", "rope_settings"]

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """inverse_frequencies float32 [width / 2]; scaling: of cosines and sines."""

    inverse_frequencies: Tensor
    scaling: float

    @property
    def width(self) -> int:
        """Values of a head that turn."""
        return 2 * len(self.inverse_frequencies)

    def table(self, positions: int) -> Tensor:
        """-> float32 [positions, width up to a multiple of 16]: cosines, then sines, then zeros."""
        angles = torch.arange(positions).float()[:, None] * self.inverse_frequencies
        table = torch.cat([angles.cos() * self.scaling, angles.sin() * self.scaling], -1)
        return torch.nn.functional.pad(table, (0, -self.width % 16)).contiguous()


def rope_settings(config: Any, layer_type: str | None) -> Mapping[str, Any]:
    """The settings of a layer's RoPE: config.rope_parameters, or those of its type in it."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, Mapping):
        raise PaleyError("config.json has no rope_parameters")
    if any(isinstance(part, Mapping) for part in found.values()):
        found = found.get(layer_type)
        if not isinstance(found, Mapping):
            raise PaleyError(f"config.json has no rope_parameters for layers of type {layer_type}")
    return found


def rope_of(settings: Mapping[str, Any], head_dim: int, config: Any) -> Rope:
    """The angles for settings of one of KINDS."""
    kind, base = settings.get("rope_type", "default"), float(settings["rope_theta"])
    dim = int(head_dim * float(settings.get("partial_rotary_factor") or 1.0))
    if kind not in KINDS:
        raise PaleyError(f"RoPE of type {kind!r} is not supported, only {', '.join(KINDS)}")
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    frequencies = 1.0 / powers
    if kind == "linear":
        return Rope(frequencies / float(settings["factor"]), 1.0)
    if kind == "llama3":
        return Rope(_llama3(frequencies, settings), 1.0)
    if kind == "yarn":
        return _yarn(powers, dim, base, settings, config)
    return Rope(frequencies, 1.0)


def _llama3(frequencies: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched by `factor`, short ones stay, those between are blended."""
    factor, low, high = (float(settings[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = settings["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > context / low, frequencies / factor, frequencies)
    smooth = (context / waves - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = ~(waves < context / high) & ~(waves > context / low)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, dim: int, base: float, settings: Mapping[str, Any], config: Any) -> Rope:
    """arXiv:2309.00071"""
    context = settings["original_max_position_embeddings"]
    factor = settings.get("factor")
    if factor is None:
        factor = config.max_position_embeddings / context
    scaling = settings.get("attention_factor")
    if scaling is None:
        of_scores, of_all = settings.get("mscale"), settings.get("mscale_all_dim")
        scaling = _mscale(factor, of_scores) / _mscale(factor, of_all) if of_scores and of_all else _mscale(factor, 1)

    def dimension(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return Rope(1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(scaling))


def _mscale(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0
