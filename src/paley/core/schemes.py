"""Schemes: how each place where a tensor is quantized (a slot) is to be treated.

Plain frozen dataclasses, checked once where they are made. Pydantic validates the same classes strictly when
they come from a file (a plan, a recipe, a checkpoint's configuration).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.transforms import Transform

__all__ = ["ActivationScheme", "AttentionSlot", "LinearSlot", "WeightScheme"]

_STRICT = {"extra": "forbid"}


def _check_group_size(where: str, group_size: int | None) -> None:
    if group_size is not None and group_size < 1:
        raise PaleyError(f"{where}: group_size must be a positive integer or null, got {group_size}")


def _check_scale(where: str, key: str, name: str, scale: str) -> None:
    grid = grids.load(name)
    by_rms = scale in ("rms", "unbiased")
    if grid.affine and by_rms:
        raise PaleyError(f"{where}: grid {name!r} has a zero point and needs {key} 'absmax'")
    if grid.p > 1 and not by_rms:
        raise PaleyError(
            f"{where}: grid {name!r} is made for Gaussian vectors of {grid.p} values and needs {key} 'rms'"
        )


@dataclass(frozen=True)
class WeightScheme:
    """grid: a name of `paley.core.grids`; group_size: input columns that share a scale (None: the whole row).

    scale_search "absmax" lets the grid's end meet the largest weight; "mse" tries smaller scales and keeps
    the one of least error; "rms" takes the best scale for Gaussian values of the group's rms, as HIGGS does; "unbiased"
    finds the codes so, and then stretches each group to the length of its weight (gptq refits its scales itself).
    sweeps: rounds of scale refit and coordinate descent after GPTQ.
    """

    __pydantic_config__: ClassVar = _STRICT

    grid: str
    group_size: int | None = None
    method: Literal["nearest", "gptq"] = "gptq"
    scale_search: Literal["absmax", "mse", "rms", "unbiased"] = "mse"
    sweeps: int = 4

    def __post_init__(self) -> None:
        _check_scale("weight scheme", "scale_search", self.grid, self.scale_search)
        _check_group_size("weight scheme", self.group_size)
        if not 0 <= self.sweeps <= 100:
            raise PaleyError(f"weight scheme: sweeps must be between 0 and 100, got {self.sweeps}")

    def on_grid(self, name: str) -> WeightScheme:
        """The same on another grid; scales by rms where that has vectors, or was made for values of unit rms."""
        grid, scale_search = grids.load(name), self.scale_search
        by_rms = scale_search in ("rms", "unbiased")
        if not by_rms and (grid.p > 1 or name.startswith("custom-")):
            scale_search = "rms"
        elif by_rms and grid.affine:
            scale_search = "absmax"
        return replace(self, grid=name, scale_search=scale_search)


@dataclass(frozen=True)
class ActivationScheme:
    """A dynamic quantizer of the last dimension: one scale per token, or per token and group.

    scale "absmax": scale = clip_ratio * max|x| / grid.peak (both ends * clip_ratio on an affine grid).
    scale "rms": scale = clip_ratio * rms(x) * grid.gaussian_scale, so 1.0 is optimal for Gaussian entries.
    """

    __pydantic_config__: ClassVar = _STRICT

    grid: str
    scale: Literal["absmax", "rms"] = "absmax"
    clip_ratio: float = 1.0
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_scale("activation scheme", "scale", self.grid, self.scale)
        _check_group_size("activation scheme", self.group_size)
        if not 0.0 < self.clip_ratio <= 4.0:
            raise PaleyError(f"activation scheme: clip_ratio must be in (0, 4], got {self.clip_ratio}")


@dataclass(frozen=True)
class LinearSlot:
    """One linear layer: its weight, its input, and the rotation its input gets at run time before rounding."""

    __pydantic_config__: ClassVar = _STRICT

    weight: WeightScheme | None = None
    input: ActivationScheme | None = None
    transform: Transform | None = None

    def stored_width(self, in_features: int) -> int:
        """Columns of the stored weight of a layer that reads `in_features` values: more where its input is expanded."""
        return in_features if self.transform is None else self.transform.out_dim


@dataclass(frozen=True)
class AttentionSlot:
    """One attention layer's cache: keys (after RoPE and `transform`, which queries get too) and values.

    center_keys: the layer stores a mean key of each head, which is taken off every key first. Softmax does not
    notice (it adds the same q . mean to all scores of a query), and what is left is smaller to round.
    """

    __pydantic_config__: ClassVar = _STRICT

    keys: ActivationScheme | None = None
    values: ActivationScheme | None = None
    transform: Transform | None = None
    center_keys: bool = False
