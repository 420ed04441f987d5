"""grid_matmul: the product of an input with a coded weight, y = round(T x) · Ŵᵀ, and its implementations.

A product is one implementation. `PRODUCTS` lists them, the fastest first; the list is walked once for each layer, when
a model is loaded. Each must equal `grid_matmul`, its meaning, to float32 rounding. `Integer` and `Bfloat` need not:
they round more, but by far less than the weight was rounded. Scores are measured with neither.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from paley import kernels
from paley.core import packing, planes
from paley.core.errors import PaleyError, nearest_name
from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme
from paley.kernels import gpu, matmul, rounding
from paley.kernels.products import products
from paley.kernels.stored import StoredWeight
from paley.ops.inputs import InputCodes, encode_input, round_input
from paley.ops.rounding import turn_back

__all__ = [
    "CALIBRATION",
    "EXACT",
    "PRODUCTS",
    "CodedWeight",
    "Product",
    "bfloat16_linear",
    "choose",
    "grid_matmul",
    "input_key",
]


class CodedWeight(Protocol):
    """A weight [rows, width] as a layer holds it; outlier_columns int32 [k] and diagonal [transform.in_dim], or None.

    diagonal_key: the same for layers that read one input and have equal diagonals.
    """

    rows: int
    width: int
    scheme: LinearScheme
    outlier_columns: Tensor | None
    diagonal: Tensor | None
    diagonal_key: int

    def quantized(self, rows: slice = ...) -> Quantized | None: ...
    def dequantize(self, dtype: torch.dtype = ..., rows: slice = ...) -> Tensor: ...


_VALUES = 2**22  # of a weight that are decoded at a time: a vocabulary's head would take four times its size otherwise


def grid_matmul(x: Tensor, weight: CodedWeight) -> Tensor:
    """x [..., in] (in: transform.in_dim if there is a transform) -> [..., out], in x's dtype."""
    rounded = round_input(x, weight.scheme, weight.outlier_columns, weight.diagonal)
    return linear(rounded, weight.dequantize(rounded.dtype))


def bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> x Wᵀ + bias [..., out], in x's dtype.

    float32 on the CPU is rounded to bfloat16 as it is multiplied, if there are instructions for that and x needs no
    gradient. Sums stay float32: bfloat16 numbers between 16 and 32 are 0.125 apart.
    """
    exact = x.dtype != torch.float32 or weight.dtype != torch.float32 or x.requires_grad
    if exact or not kernels.multiplies_bfloat16(x.device):
        return linear(x, weight, bias)
    y = products(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def input_key(weight: CodedWeight) -> tuple[Hashable, ...]:
    """Two layers make the same of an input only if they agree in this."""
    return weight.diagonal is None, weight.diagonal_key, id(weight.outlier_columns)


class Product(Protocol):
    """One weight, ready to be multiplied. `how`: two products that agree in it make the same of an input."""

    name: str

    @property
    def how(self) -> Hashable: ...

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        """Whether it multiplies weights of such a scheme, `width` columns wide as stored."""
        ...

    def encode(self, x: Tensor) -> Any:
        """x [..., in] -> what `run` reads, for all layers that read this x."""
        ...

    def run(self, encoded: Any, x: Tensor) -> Tensor:
        """-> [..., out], in x's dtype."""
        ...

    def fits(self, scheme: LinearScheme) -> bool:
        """Whether it still serves its layer, whose inputs are now rounded as `scheme` says."""
        ...


class Planes:
    """Binary weights times 4-bit inputs, on their bits, by native kernels (`paley.core.planes`)."""

    name = "planes"

    def __init__(self, weight: CodedWeight, dtype: torch.dtype):
        q = weight.quantized()
        assert q is not None
        self._layer = weight
        self._weight = planes.prepare(q.codes, q.grid.group_points(q.scales))
        self._outliers = None if q.outliers is None else q.outliers.dequantize()
        self._scheme = weight.scheme

    @property
    def how(self) -> Hashable:
        return ("codes", self._scheme.input, self._scheme.transform, *input_key(self._layer))

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        if scheme.weight is None or scheme.input is None or scheme.input.refit or device.type != "cpu":
            return False
        weight, inputs = scheme.weight.grid, scheme.input.grid
        size = scheme.weight.group_size or width
        alike = size == (scheme.input.group_size or width)
        four = weight.free and weight.size == 4 and inputs.affine and inputs.size == 16
        return four and alike and kernels.planes_fit(size)

    def encode(self, x: Tensor) -> InputCodes | None:
        """None for an input that wants gradients, which the kernels do not have."""
        if x.requires_grad:
            return None
        return encode_input(x, self._layer.scheme, self._layer.outlier_columns, self._layer.diagonal)

    def run(self, encoded: InputCodes | None, x: Tensor) -> Tensor:
        if encoded is None:
            return grid_matmul(x, self._layer)
        y = planes.matmul(encoded.codes, encoded.scales, encoded.zeros, self._weight)
        if self._outliers is not None and encoded.outlier_values is not None:
            y.addmm_(encoded.outlier_values.float(), self._outliers.T)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def fits(self, scheme: LinearScheme) -> bool:
        return scheme == self._scheme


class Integer:
    """Any quantized weight times inputs that are rounded to integers, straight from its codes, by native kernels.

    Points of 8 bits are off by at most 9 % of their grid's own error (p2n256), and inputs that a scheme does not round,
    Gaussian ones, by .6 % of their size: the product is off by less than an eighth of what rounding the weight changed,
    and mostly much less. From 5 bits on both have 13 bits (`paley.kernels.matmul`).
    """

    name = "integer"

    def __init__(self, weight: CodedWeight, dtype: torch.dtype):
        q = weight.quantized()
        assert q is not None
        self._layer = weight
        self._scheme = weight.scheme
        self._weight = matmul.prepare(q, weight.scheme)

    @property
    def how(self) -> Hashable:
        scheme = self._scheme
        return ("integers", self._weight.plan.shared, scheme.input, scheme.transform, *input_key(self._layer))

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        return device.type == "cpu" and kernels.backend() == "native" and matmul.takes(scheme, width)

    def encode(self, x: Tensor) -> Tensor | None:
        """None for an input that wants gradients, which the kernels do not have."""
        if x.requires_grad:
            return None
        layer, tokens = self._layer, x.reshape(-1, x.shape[-1])
        if not rounding.takes(x, layer.scheme.input):
            turned = round_input(tokens, layer.scheme, layer.outlier_columns, layer.diagonal)
            return matmul.encode(turned.float(), self._weight)
        return matmul.encode(tokens.float(), self._weight, layer.scheme, layer.diagonal)

    def run(self, encoded: Tensor | None, x: Tensor) -> Tensor:
        if encoded is None:
            return grid_matmul(x, self._layer)
        y = matmul.matmul(encoded, x.numel() // x.shape[-1], self._weight)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def fits(self, scheme: LinearScheme) -> bool:
        return scheme == self._scheme


class Triton:
    """Grids of one or two values a code on a GPU, straight from packed codes (`paley.kernels.gpu`).

    `auto` takes it only if PALEY_TRITON=1.
    """

    name = "triton"

    def __init__(self, weight: CodedWeight, dtype: torch.dtype):
        from paley.kernels.gpu.matmul import prepare

        q = weight.quantized()
        assert q is not None
        self._layer = weight
        codes = packing.pack_codes(q.codes, q.grid.size)
        self._weight = prepare(StoredWeight("weight", codes, q.scales, q.zeros, q.grid, q.width))

    @property
    def how(self) -> Hashable:
        """As of `Packed`."""
        return ("values", self._layer.scheme.input, (self._layer.scheme.transform, *input_key(self._layer)))

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        if not gpu.runs_on(device):
            return False
        from paley.kernels.gpu.matmul import takes

        return takes(scheme, width)

    def encode(self, x: Tensor) -> Tensor:
        return round_input(x, self._layer.scheme, None, self._layer.diagonal)

    def run(self, encoded: Tensor, x: Tensor) -> Tensor:
        if encoded.requires_grad:  # which the kernel does not have
            return linear(encoded, self._layer.dequantize(x.dtype))
        from paley.kernels.gpu.matmul import matmul

        y = matmul(encoded.reshape(-1, encoded.shape[-1]), self._weight)
        return y.view(*x.shape[:-1], y.shape[-1])

    def fits(self, scheme: LinearScheme) -> bool:
        return True


class Dense:
    """The weight written out once. If its input is not rounded, the transform goes into it: W (T x) = (W T) x."""

    name = "dense"

    def __init__(self, weight: CodedWeight, dtype: torch.dtype):
        self._layer = weight
        self._turned = self._turns(weight.scheme)
        if weight.scheme.weight is None and not self._turned:
            self.weight = weight.dequantize(dtype)  # the very tensor, if it has the type
            return
        few = max(1, _VALUES // weight.width)
        pieces = (self._written(slice(start, start + few)) for start in range(0, weight.rows, few))
        first = next(pieces)
        self.weight = torch.empty(weight.rows, first.shape[1], dtype=dtype, device=first.device)
        self.weight[: len(first)] = first
        for number, piece in enumerate(pieces, 1):
            self.weight[number * few : number * few + len(piece)] = piece

    def _written(self, rows: slice) -> Tensor:
        """float32: some rows of the weight, the transform in them if it goes there."""
        dense, transform = self._layer.dequantize(torch.float32, rows), self._layer.scheme.transform
        if self._turned and transform is not None:
            dense = turn_back(dense, transform)
            if self._layer.diagonal is not None:
                dense = dense / self._layer.diagonal.float()
        return dense

    @staticmethod
    def _turns(scheme: LinearScheme) -> bool:
        """Whether the transform goes into the weight."""
        return scheme.input is None and scheme.transform is not None

    @property
    def how(self) -> Hashable:
        """The scheme of a layer may change while clip ratios are searched."""
        turn = None if self._turned else (self._layer.scheme.transform, *input_key(self._layer))
        return ("values", self._layer.scheme.input, turn)

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        return scheme.weight is not None

    def encode(self, x: Tensor) -> Tensor:
        return (
            x if self._turned else round_input(x, self._layer.scheme, self._layer.outlier_columns, self._layer.diagonal)
        )

    def run(self, encoded: Tensor, x: Tensor) -> Tensor:
        return linear(encoded, self.weight.to(x.dtype))

    def fits(self, scheme: LinearScheme) -> bool:
        return self._turned == self._turns(scheme)


class Packed:
    """The reference: the weight is decoded for each product. It takes the least memory."""

    name = "packed"

    def __init__(self, weight: CodedWeight, dtype: torch.dtype):
        self._layer = weight

    @property
    def how(self) -> Hashable:
        """The scheme of a layer may change while a model is calibrated."""
        return ("values", self._layer.scheme.input, (self._layer.scheme.transform, *input_key(self._layer)))

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        return True

    def encode(self, x: Tensor) -> Tensor:
        layer = self._layer
        return round_input(x, layer.scheme, layer.outlier_columns, layer.diagonal)

    def run(self, encoded: Tensor, x: Tensor) -> Tensor:
        return linear(encoded, self._layer.dequantize(x.dtype))

    def fits(self, scheme: LinearScheme) -> bool:
        return True


class Bfloat(Dense):
    """As `Dense`, also of an unquantized weight, but weight and input are rounded to bfloat16 when they are multiplied.

    Calibration text runs through it, and the trials of a search: that noise of 2⁻⁹ is far below any rounding's. `auto`
    never takes it, and no model is loaded with it. If the machine has no instructions for it, this is `Dense`: codes
    are those of the machine.
    """

    name = "bfloat16"

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        return True

    def run(self, encoded: Tensor, x: Tensor) -> Tensor:
        return bfloat16_linear(encoded, self.weight.to(x.dtype))


PRODUCTS = {product.name: product for product in (Planes, Integer, Triton, Dense, Packed)}
EXACT = "dense"  # scores are measured with it: it does not depend on the native library
CALIBRATION = Bfloat.name
_BY_NAME = {**PRODUCTS, CALIBRATION: Bfloat}


def choose(weight: CodedWeight, width: int, device: torch.device, dtype: torch.dtype, name: str = "auto") -> Product:
    """The fastest product that takes the weight, or the one of that name, made ready; dtype: of a dense weight.

    A weight that is kept unquantized is multiplied as it is, unless the name is CALIBRATION.
    """
    if name != "auto" and name not in _BY_NAME:
        known = ("auto", *PRODUCTS)
        raise PaleyError(f"product {name!r} is none of {', '.join(known)}{nearest_name(name, known)}")
    if weight.scheme.weight is None and name != CALIBRATION:
        return Packed(weight, dtype)
    if name != "auto" and not _BY_NAME[name].takes(weight.scheme, width, device):
        raise PaleyError(
            f"product {name!r} does not take weights such as {weight.scheme} on {device}; use product='auto'"
        )
    automatic = [product for product in PRODUCTS.values() if product is not Triton or gpu.chosen(device)]
    wanted = automatic if name == "auto" else [_BY_NAME[name]]
    return next(product for product in wanted if product.takes(weight.scheme, width, device))(weight, dtype)
