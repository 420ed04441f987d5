"""A linear layer that keeps its weight packed: what replaces nn.Linear in a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError
from paley.core.rounding import Outliers, Quantized, check_groups
from paley.core.schemes import LinearSlot
from paley.format.spec import PARTS, SCALE_DTYPE, encode_linear, expected_tensors, unpack_weight
from paley.model.inputs import SharedInput, encode_input, round_input
from paley.model.plane_product import PlaneWeight, runs_on_planes

__all__ = ["QuantLinear"]

T = TypeVar("T")


class QuantLinear(nn.Module):
    """y = round(T x) W^T + b, with W [out_features, in_features] stored as the checkpoint names it.

    codes uint8 [out, bytes] as packed, scales float16 [out, groups], zeros uint8 [out, groups] on affine grids, and
    three tensors of outliers where the slot has any (docs/format.md); a slot without a weight scheme keeps `weight`
    [out, in]. in_features is the stored width: slot.transform.out_dim where there is a transform. Codes and scales
    keep their dtypes under any cast.
    """

    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    outliers: Tensor | None
    outlier_scales: Tensor | None
    outlier_columns: Tensor | None
    dense: Tensor | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        slot: LinearSlot,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        name: str = "QuantLinear",
    ):
        """name: what errors call the layer; dtype: of the bias, and of a weight left unquantized."""
        super().__init__()
        self.in_features, self.out_features, self.slot, self.name = in_features, out_features, slot, name
        if slot.input is not None:
            check_groups(in_features, slot.input.group_size, f"{name}: input")
        stored = expected_tensors(name, slot, in_features, out_features)
        tensors = {
            full.rpartition(".")[2]: torch.zeros(shape, dtype=kind or dtype, device=device)
            for full, (kind, shape) in stored.items()
        }
        for part in PARTS:
            self.register_buffer(part[1:], tensors.get(part[1:]))
        self.register_buffer("dense", None, persistent=False)
        self.register_parameter("weight", _parameter(tensors.get("weight")))
        start = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", _parameter(start))
        self.shared_input: SharedInput | None = None
        self._planes: PlaneWeight | None = None

    @classmethod
    def from_linear(
        cls, linear: Any, slot: LinearSlot, q: Quantized | None, *, name: str = "QuantLinear"
    ) -> QuantLinear:
        """Takes the bias of an nn.Linear or QuantLinear, and its weight where the slot leaves that (q None)."""
        out_features, in_features = linear.weight.shape
        dtype, device, bias = linear.weight.dtype, linear.weight.device, linear.bias is not None
        made = cls(in_features, out_features, bias=bias, slot=slot, dtype=dtype, device=device, name=name)
        if q is not None:
            made.set_quantized_(q)
        elif slot.weight is None:
            made.weight = _parameter(linear.weight.detach().clone())
        else:
            raise PaleyError(f"{name}: the slot wants codes of {slot.weight.grid.name!r}, but none came")
        if bias:
            made.bias = _parameter(linear.bias.detach().clone())
        return made

    @torch.no_grad()
    def set_quantized_(self, q: Quantized) -> None:
        """Packs in q (codes [out, in / p], scales [out, groups]); scales must be float16 values."""
        scheme = self.slot.weight
        if scheme is None:
            raise PaleyError(f"{self.name}: the slot keeps the weight unquantized, but codes came")
        if q.grid != scheme.grid:
            raise PaleyError(f"{self.name}: the slot wants codes of {scheme.grid.name!r}, got {q.grid.name!r}")
        if (q.codes.shape[0], q.width) != (self.out_features, self.in_features):
            want, got = (self.out_features, self.in_features), (q.codes.shape[0], q.width)
            raise PaleyError(f"{self.name}: codes must have shape {want}, got {got}")
        if (0 if q.outliers is None else len(q.outliers.columns)) != self.slot.outliers:
            raise PaleyError(f"{self.name}: the slot wants {self.slot.outliers} outlier columns, other codes came")
        for full, tensor in encode_linear(self.name, q).items():
            own = getattr(self, full.rpartition(".")[2])
            if own.shape != tensor.shape:
                raise PaleyError(f"{full}: must have shape {tuple(own.shape)}, got {tuple(tensor.shape)}")
            own.copy_(tensor)
        self._planes = None  # tensors made in inference mode do not know that they were written to
        self.release_()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> the weight [out, in] in `dtype`, computed in float32."""
        q = self.quantized()
        if q is None:
            assert self.weight is not None  # __init__ makes the one or the other
            return self.weight.to(dtype)
        return q.dequantize(dtype)

    def quantized(self) -> Quantized | None:
        """The weight's codes, unpacked; None where it is not quantized."""
        scheme, codes, scales = self.slot.weight, self.codes, self.scales
        if scheme is None or codes is None or scales is None:
            return None
        unpacked = unpack_weight(codes, scheme.grid, self.in_features)
        return Quantized(unpacked, scales, self.zeros, scheme.grid, self.in_features, self._quantized_outliers())

    def _quantized_outliers(self) -> Outliers | None:
        if self.outliers is None or self.outlier_scales is None or self.outlier_columns is None:
            return None
        return Outliers(self.outlier_columns, self.outliers, self.outlier_scales)

    def materialize_(self, dtype: torch.dtype = torch.float32) -> None:
        """Keeps the dense weight beside the codes, unsaved: faster, and as large as an unquantized layer."""
        if self.slot.weight is not None:
            self.dense, self._planes = self.dequantize(dtype), None

    def release_(self) -> None:
        """Drops the dense weight."""
        self.dense = None

    def round_input(self, x: Tensor) -> Tensor:
        """x [..., in] (transform.in_dim where there is a transform) -> what meets the weight."""
        nothing = self.slot.transform is None and self.slot.input is None
        return round_input(x, self.slot) if nothing else self._once(round_input, x)

    def _once(self, make: Callable[..., T], x: Tensor) -> T:
        if self.shared_input is None:
            return make(x, self.slot, self.outlier_columns)
        return self.shared_input.once(make, x, self.slot, self.outlier_columns)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] (in: transform.in_dim where there is a transform) -> [..., out], in x's dtype.

        With a native kernel for weights and inputs it works on the codes, and equals a product of floats to rounding.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense is None and x.device.type == "cpu" and not x.requires_grad and self.on_planes:
            y = self._plane_weight().product(self._once(encode_input, x))
            y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
            return y if bias is None else y + bias
        x = self.round_input(x)
        weight = self.dequantize(x.dtype) if self.dense is None else self.dense.to(x.dtype)
        return nn.functional.linear(x, weight, bias)

    @property
    def on_planes(self) -> bool:
        """Whether a native kernel multiplies the codes as they are, on a CPU and without gradients."""
        return runs_on_planes(self.slot, self.in_features)

    def _plane_weight(self) -> PlaneWeight:
        """The weight as the kernel wants it, made anew only where the stored tensors have changed."""
        parts = tuple(getattr(self, part[1:]) for part in PARTS)
        if self._planes is None or not self._planes.is_of(parts):
            q = self.quantized()
            assert q is not None
            self._planes = PlaneWeight.of(q, parts)
        return self._planes

    def extra_repr(self) -> str:
        weight = self.slot.weight.grid.name if self.slot.weight else "float"
        inputs = self.slot.input.grid.name if self.slot.input else "float"
        return f"in={self.in_features}, out={self.out_features}, weight={weight}, input={inputs}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model (model.bfloat16()) must not round the scales: they follow the device only.
        kept = {name: getattr(self, name) for name in ("scales", "outlier_scales")}
        dense = self.dense
        super()._apply(fn, recurse)
        for name, scales in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != SCALE_DTYPE:
                setattr(self, name, scales.to(moved.device))
        if dense is not None and self.dense is not None and self.dense.dtype != dense.dtype:
            self.materialize_(self.dense.dtype)
        return self


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)
