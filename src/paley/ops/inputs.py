"""What a quantized linear does to its input: transform, set outliers apart, round; once for all that read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from paley.core.rounding import OUTLIER_GRID
from paley.core.schemes import ActivationScheme, LinearScheme
from paley.ops import rounding

__all__ = ["InputCodes", "SharedInput", "encode_input", "round_input"]

T = TypeVar("T")


class SharedInput:
    """Hands what one linear made of an input on to the others that read the same tensor next (q, k, v; gate, up).

    Each of the `readers` takes it once in a forward; the last one takes it away.
    """

    def __init__(self, readers: int):
        self.readers = readers
        self.clear()

    def clear(self) -> None:
        self._begin(None)

    def _begin(self, x: Tensor | None) -> None:
        self._x, self._made, self._taken = x, dict[Hashable, Any](), set[int]()

    def take(self, reader: object, x: Tensor, how: Hashable, make: Callable[[Tensor], T]) -> T:
        """make(x), or what another reader made of this very x in the same way; not to be written to."""
        if self._x is not x or id(reader) in self._taken:
            self._begin(x)
        if how not in self._made:
            self._made[how] = make(x)
        made = self._made[how]
        self._taken.add(id(reader))
        if len(self._taken) == self.readers:
            self.clear()
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return SharedInput(self.readers)  # without the tensor at hand; `memo` keeps it the one of all its readers


def round_input(
    x: Tensor, scheme: LinearScheme, outlier_columns: Tensor | None = None, diagonal: Tensor | None = None
) -> Tensor:
    """x [..., in] (transform.in_dim if there is a transform) -> what meets the weight.

    outlier_columns: integers [k], those that have a grid and a scale of their own, as their weights do.
    diagonal: [transform.in_dim], what x is divided by first.
    """
    if scheme.input is None or outlier_columns is None:
        return rounding.round_trip(x, scheme.input, transform=scheme.transform, diagonal=diagonal)
    turned = rounding.round_trip(x, None, transform=scheme.transform, diagonal=diagonal)
    own, rest, index = _apart(turned, outlier_columns)
    return rounding.round_trip(rest, scheme.input).index_copy(-1, index, own)


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


def encode_input(
    x: Tensor, scheme: LinearScheme, outlier_columns: Tensor | None = None, diagonal: Tensor | None = None
) -> InputCodes:
    """As `round_input`, for an affine grid and without the last step; x [..., in] is flattened to tokens."""
    assert scheme.input is not None
    x, own = x.reshape(-1, x.shape[-1]), None
    if outlier_columns is None:
        q = rounding.quantize_dynamic(x, scheme.input, torch.float32, transform=scheme.transform, diagonal=diagonal)
    else:
        turned = rounding.round_trip(x, None, transform=scheme.transform, diagonal=diagonal)
        own, rest, _ = _apart(turned, outlier_columns)
        q = rounding.quantize_dynamic(rest, scheme.input, torch.float32)
    assert q.zeros is not None
    return InputCodes(q.codes, q.scales, q.zeros, own)
