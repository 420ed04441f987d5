"""What a quantized linear does to its input: transform, set outliers apart, round; once for all that read it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from paley.core import rounding
from paley.core.rounding import OUTLIER_GRID
from paley.core.schemes import ActivationScheme, LinearSlot

__all__ = ["InputCodes", "SharedInput", "encode_input", "round_input"]

T = TypeVar("T")


class SharedInput:
    """Transforms and rounds an input once for the linears that read it one after the other (q, k and v; gate, up)."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, Callable, LinearSlot, Tensor | None, Any] | None = None

    def once(self, make: Callable[..., T], x: Tensor, slot: LinearSlot, columns: Tensor | None = None) -> T:
        """make(x, slot, columns), which must not be written to. Of the slot, its weight does not matter here."""
        slot = replace(slot, weight=None, outliers=0)
        if self._seen is not None:
            source, version, by, of, apart, made = self._seen
            same = source() is x and version == x._version
            if same and by is make and of == slot and _equal(apart, columns):
                return made
        made = make(x, slot, columns)
        if not x.requires_grad and not x.is_inference():
            self._seen = (weakref.ref(x, self._forget), x._version, make, slot, columns, made)
        return made

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._seen is not None and self._seen[0] is source:
            self._seen = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return memo.setdefault(id(self), SharedInput())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def round_input(x: Tensor, slot: LinearSlot, outlier_columns: Tensor | None = None) -> Tensor:
    """x [..., in] (transform.in_dim where there is a transform) -> what meets the weight.

    outlier_columns: integers [k], those that have a grid and a scale of their own, as their weights do.
    """
    if slot.transform is not None:
        x = slot.transform.apply(x)
    if slot.input is None:
        return x
    if outlier_columns is None:
        return rounding.round_trip(x, slot.input)
    own, rest, index = _apart(x, outlier_columns)
    return rounding.round_trip(rest, slot.input).index_copy(-1, index, own)


def _apart(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., in] -> its outliers [..., k], rounded; x with zeros in their place; their columns int64 [k]."""
    index = columns.long()
    own = rounding.round_trip(x.index_select(-1, index), ActivationScheme(OUTLIER_GRID))
    return own, x.index_fill(-1, index, 0.0), index


@dataclass(frozen=True)
class InputCodes:
    """A rounded input as its codes: uint8 [tokens, in], their scales and zeros [tokens, groups].

    outlier_values: [tokens, k], rounded; in their columns the codes are their group's zero point, which stands for 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    outlier_values: Tensor | None


def encode_input(x: Tensor, slot: LinearSlot, outlier_columns: Tensor | None = None) -> InputCodes:
    """As `round_input`, for an affine grid and without the last step; x [..., in] is flattened to tokens."""
    assert slot.input is not None
    x, own = x.reshape(-1, x.shape[-1]), None
    if slot.transform is not None:
        x = slot.transform.apply(x)
    if outlier_columns is not None:
        own, x, _ = _apart(x, outlier_columns)
    q = rounding.quantize_dynamic(x.contiguous(), slot.input, torch.float32)
    assert q.zeros is not None
    return InputCodes(q.codes, q.scales, q.zeros, own)
