"""Schemes: what is done at each site, a place of a model where a tensor can be quantized.

Plain frozen dataclasses, checked once when they are made. Pydantic validates the same classes strictly when
they are read from a file (a plan, a recipe, a checkpoint's configuration).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid, FixedGrid
from paley.core.plain_grids import AnyGridField, FixedGridField
from paley.core.transforms import Transform

__all__ = ["ActivationScheme", "AttentionScheme", "LinearScheme", "Rotation", "Schemes", "WeightScheme"]

_STRICT = {"extra": "forbid"}
_BY_EM = ("em", "em_diagonal", "em_inverse")
_OF_FIXED = ("absmax", "mse", "mse_diagonal", "signed", "signed_diagonal", "rms", "unbiased")


def _check_group_size(where: str, group_size: int | None) -> None:
    if group_size is not None and group_size < 1:
        raise PaleyError(f"{where}: group_size must be a positive integer or null, got {group_size}")


def _check_scale(where: str, key: str, grid: FixedGrid, scale: str) -> None:
    name = grid.name
    by_rms = scale in ("rms", "unbiased")
    if scale.startswith("signed") and not grid.affine:
        raise PaleyError(f"{where}: grid {name!r} has no zero point, which {key} {scale!r} chooses; set 'mse'")
    if grid.affine and by_rms:
        raise PaleyError(f"{where}: grid {name!r} has a zero point and needs {key} 'absmax'")
    if (grid.p > 1 or grid.sequential) and not by_rms:
        made_for = "rows of Gaussian values" if grid.sequential else f"Gaussian vectors of {grid.p} values"
        raise PaleyError(f"{where}: grid {name!r} is made for {made_for} and needs {key} 'rms'")
    if by_rms:
        grid.check_scaled(f"{where}: grid {name!r}")


@dataclass(frozen=True)
class WeightScheme:
    """grid: a grid, or the name of a packaged one; group_size: input columns that share a scale (None: the whole row).

    scale_search "absmax" scales the grid's end to the largest weight; "mse" tries smaller scales and keeps
    the one of least error; "rms" takes the best scale for Gaussian values of the group's rms, as HIGGS does; "unbiased"
    finds the codes like "rms" and then stretches each group to the length of its weight (gptq refits its own scales).
    "signed" is "mse" on a grid with a zero point that is one of the two codes in the middle, so that a scale with a
    sign can stand for the two: d · (c - 8) of 4-bit codes, with d < 0 where 7 is the zero (ggml's Q4_0, Q5_0).
    With gptq "mse_diagonal" and "signed_diagonal" weigh the squared errors by the diagonal of the damped Hessian X^T X.
    The points of free grids come from expectation maximization (arXiv:2504.05352): "em" weighs all errors alike,
    "em_diagonal" by that diagonal, "em_inverse" by 1 / [H^-1]_ii^2.
    sweeps: rounds of scale refit and coordinate descent after GPTQ; on a sequential grid any number is one refit.
    """

    __pydantic_config__: ClassVar = _STRICT

    grid: AnyGridField
    group_size: int | None = None
    method: Literal["nearest", "gptq"] = "gptq"
    scale_search: Literal[
        "absmax", "mse", "mse_diagonal", "signed", "signed_diagonal", "rms", "unbiased",
        "em", "em_diagonal", "em_inverse",
    ] = "mse"  # fmt: skip
    sweeps: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", grid := grids.as_grid(self.grid))
        if grid.free != self.by_em:
            need = " or ".join(map(repr, _BY_EM if grid.free else _OF_FIXED))
            raise PaleyError(f"weight scheme: grid {grid.name!r} needs scale_search {need}, got {self.scale_search!r}")
        if not self.by_em:
            _check_scale("weight scheme", "scale_search", grids.as_fixed(grid), self.scale_search)
        _check_group_size("weight scheme", self.group_size)
        if not 0 <= self.sweeps <= 100:
            raise PaleyError(f"weight scheme: sweeps must be between 0 and 100, got {self.sweeps}")

    @property
    def by_em(self) -> bool:
        """Whether the points are fitted to each group, as free grids need."""
        return self.scale_search in _BY_EM

    @property
    def needs_data(self) -> bool:
        """Whether codes depend on the layer's inputs."""
        return self.method == "gptq" or self.scale_search in ("em_diagonal", "em_inverse")

    @property
    def without_data(self) -> WeightScheme:
        """The same for weights without calibration inputs: rounded to nearest, all errors weighed alike."""
        alike: Any = self.scale_search.removesuffix("_diagonal").removesuffix("_inverse")
        return replace(self, method="nearest", scale_search=alike)

    @property
    def tries_scales(self) -> bool:
        """Whether scales are tried for each group."""
        return self.signed or self.scale_search.startswith("mse")

    @property
    def signed(self) -> bool:
        """Whether a zero point is one of the two codes in the middle."""
        return self.scale_search.startswith("signed")

    def on_grid(self, grid: AnyGrid | str) -> WeightScheme:
        """The same on another grid; scales by rms if it has vectors, or was made for values of unit rms."""
        grid, scale_search = grids.as_grid(grid), self.scale_search
        if grid.free != self.by_em:
            scale_search = "em" if grid.free else "mse"
        by_rms = scale_search in ("rms", "unbiased")
        if not grid.free and not by_rms and (grid.p > 1 or grid.sequential or not grid.packaged):
            scale_search = "rms"
        elif by_rms and grid.affine:
            scale_search = "absmax"
        elif self.signed and not grid.affine:
            scale_search = self.scale_search.replace("signed", "mse")
        return replace(self, grid=grid, scale_search=scale_search)


@dataclass(frozen=True)
class ActivationScheme:
    """A dynamic quantizer of the last dimension: one scale per token, or per token and group.

    scale "absmax": scale = clip_ratio * max|x| / grid.peak (both ends * clip_ratio on an affine grid).
    scale "rms": scale = clip_ratio * rms(x) * grid.gaussian_scale, so 1.0 is optimal for Gaussian entries.
    refit: fit scale and offset to each group's codes afterwards, by least squares; for inputs of linears only.
    """

    __pydantic_config__: ClassVar = _STRICT

    grid: FixedGridField
    scale: Literal["absmax", "rms"] = "absmax"
    clip_ratio: float = 1.0
    group_size: int | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", grids.as_fixed(self.grid))
        if self.grid.sequential:
            raise PaleyError(
                f"activation scheme: grid {self.grid.name!r} is for weights: its search is too slow for what is "
                "rounded at run time; set a grid such as gauss4"
            )
        _check_scale("activation scheme", "scale", self.grid, self.scale)
        _check_group_size("activation scheme", self.group_size)
        if not 0.0 < self.clip_ratio <= 4.0:
            raise PaleyError(f"activation scheme: clip_ratio must be in (0, 4], got {self.clip_ratio}")


@dataclass(frozen=True)
class LinearScheme:
    """One linear layer: its weight, its input, and the rotation its input gets at run time before rounding.

    diagonal: the layer stores a number for each value that it reads. Before the rotation the input is divided by it,
    and the weight's columns are multiplied by it: T = H D⁻¹. It needs a transform.
    An embedding has one too: its rows are stored rotated, and rotated back when they are looked up.

    outliers: input channels whose weights stay in int8, and so do their values if the input is rounded (Atom,
    arXiv:2310.19102).
    """

    __pydantic_config__: ClassVar = _STRICT

    weight: WeightScheme | None = None
    input: ActivationScheme | None = None
    transform: Transform | None = None
    outliers: int = 0
    diagonal: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether the diagonal, the weight's codes, or which columns are outliers, depend on the layer's inputs."""
        return self.diagonal or self.calibrated

    @property
    def calibrated(self) -> bool:
        """Whether the weight's codes depend on the layer's inputs."""
        return self.weight is not None and (self.weight.needs_data or self.outliers > 0)

    @property
    def rounds_input_alike(self) -> bool:
        """Whether the input is rounded to so few bits that it loses about as much as the weight."""
        if self.input is None or self.weight is None:
            return False
        return self.input.grid.bits <= self.weight.grid.bits + 1

    def __post_init__(self) -> None:
        if self.diagonal and self.transform is None:
            raise PaleyError("linear scheme: a diagonal stands before a transform, but transform is null")
        if self.outliers < 0:
            raise PaleyError(f"linear scheme: outliers must be at least 0, got {self.outliers}")
        if self.outliers and self.weight is None:
            raise PaleyError("linear scheme: outliers are columns of a quantized weight, but weight is null")
        if self.outliers and self.weight is not None and (p := self.weight.grid.p) > 1:
            raise PaleyError(
                f"linear scheme: a code of grid {self.weight.grid.name!r} stands for {p} columns, none of which can be "
                "an outlier alone; set outliers=0, or a grid of single values"
            )
        if self.outliers and self.weight is not None and self.weight.grid.sequential:
            raise PaleyError(
                f"linear scheme: a code of grid {self.weight.grid.name!r} changes what those after it stand for, so "
                "that no column can be an outlier; set outliers=0"
            )
        if self.outliers and self.weight is not None and self.weight.scale_search == "unbiased":
            raise PaleyError(
                "linear scheme: outliers and scale_search 'unbiased' exclude each other; set outliers=0 or "
                "scale_search=rms"
            )

    def stored_width(self, in_features: int) -> int:
        """Columns of the stored weight of a layer that reads `in_features` values: more if its input is expanded."""
        return in_features if self.transform is None else self.transform.out_dim


@dataclass(frozen=True)
class AttentionScheme:
    """One attention layer's cache: keys (after RoPE and `transform`, which queries get too) and values.

    rotate_values: values get the transform, too, and attention's output its inverse.
    center_keys: what is taken off every key of a head before rounding, so that the rest has a smaller range. `mean`:
    the mean key before RoPE, turned by RoPE to the place of each key, and added back when the key is read; the first
    token of a text has a mean of its own. `bias`: the bias of the linear that makes keys, in the same way; it needs no
    text. True: the mean key after RoPE.
    balance_keys: pairs of dimensions that RoPE turns together are made equally large, as far as queries allow it. That
    is in the weights, and a reader need not know (`model.key_statistics`). It is measured with `mean`.
    """

    __pydantic_config__: ClassVar = _STRICT

    keys: ActivationScheme | None = None
    values: ActivationScheme | None = None
    transform: Transform | None = None
    center_keys: bool | Literal["mean", "bias"] = False
    balance_keys: bool = False
    rotate_values: bool = False

    @property
    def key_transform(self) -> Transform | None:
        """Of keys that are rounded. Unrounded ones need none: it cancels in q . k, and leaving it out is exact."""
        return None if self.keys is None else self.transform

    @property
    def value_transform(self) -> Transform | None:
        """Of values that are rounded."""
        return self.transform if self.rotate_values and self.values is not None else None

    @property
    def mean_keys(self) -> int:
        """How many mean keys the layer stores for each head."""
        return 0 if self.keys is None else {True: 1, "mean": 2}.get(self.center_keys, 0)

    @property
    def needs_data(self) -> bool:
        """Whether there are mean keys to be measured."""
        return self.mean_keys > 0

    def __post_init__(self) -> None:
        if self.balance_keys and self.center_keys != "mean":
            raise PaleyError(
                f"attention scheme: balance_keys is measured with center_keys 'mean', got {self.center_keys!r}; set it "
                "to false, or center_keys=mean"
            )
        if any(scheme is not None and scheme.refit for scheme in (self.keys, self.values)):
            raise PaleyError(
                "attention scheme: a cache stores no fitted offsets; refit is for linear inputs, set it to false here"
            )


@dataclass(frozen=True)
class Schemes:
    """What is done to each weight (with its input) and to the cache of each attention, by module name."""

    linears: dict[str, LinearScheme]
    attentions: dict[str, AttentionScheme]


@dataclass(frozen=True)
class Rotation:
    """What is folded into a model's weights: R1 of the residual stream, and R2 of each value head if there is R1.

    heads also rotates queries and keys at run time (R3). None: not applied.
    """

    __pydantic_config__: ClassVar = _STRICT

    stream: Transform | None = None
    heads: Transform | None = None
