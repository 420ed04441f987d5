"""A linear layer that keeps its weight packed: what replaces nn.Linear in a quantized model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paley.core import grids, rounding
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import LinearSlot
from paley.format.spec import SCALE_DTYPE, encode_linear, expected_tensors, unpack_weight

__all__ = ["QuantLinear", "SharedInput"]


class SharedInput:
    """Transforms and rounds an input once for the linears that read it one after the other (q, k and v; gate, up)."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, LinearSlot, Tensor] | None = None

    def round(self, x: Tensor, slot: LinearSlot) -> Tensor:
        """As `round_input`; what is returned must not be written to. Of the slot, its weight does not matter here."""
        slot = replace(slot, weight=None)
        if self._seen is not None:
            source, version, seen_slot, rounded = self._seen
            if source() is x and version == x._version and seen_slot == slot:
                return rounded
        rounded = round_input(x, slot)
        if not x.requires_grad and not x.is_inference():
            self._seen = (weakref.ref(x, self._forget), x._version, slot, rounded)
        return rounded

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._seen is not None and self._seen[0] is source:
            self._seen = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return memo.setdefault(id(self), SharedInput())


def round_input(x: Tensor, slot: LinearSlot) -> Tensor:
    """x [..., in] (transform.in_dim where there is a transform) -> what meets the weight."""
    if slot.transform is not None:
        x = slot.transform.apply(x)
    return x if slot.input is None else rounding.round_trip(x, slot.input)


class QuantLinear(nn.Module):
    """y = round(T x) W^T + b, with W [out_features, in_features] stored as the checkpoint names it.

    codes uint8 [out, bytes] as packed, scales float16 [out, groups], zeros uint8 [out, groups] on affine
    grids; a slot without a weight scheme keeps `weight` [out, in]. in_features is the stored width:
    slot.transform.out_dim where there is a transform. Codes and scales keep their dtypes under any cast.
    """

    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
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
        size = None if slot.input is None else slot.input.group_size
        if size is not None and in_features % size:
            raise PaleyError(
                f"{name}: in_features={in_features} is not a multiple of the input's group_size={size}; "
                "use a divisor or expand the input"
            )
        stored = expected_tensors(name, slot, in_features, out_features)
        tensors = {
            full.rpartition(".")[2]: torch.zeros(shape, dtype=kind or dtype, device=device)
            for full, (kind, shape) in stored.items()
        }
        for part in ("codes", "scales", "zeros"):
            self.register_buffer(part, tensors.get(part))
        self.register_buffer("dense", None, persistent=False)
        self.register_parameter("weight", _parameter(tensors.get("weight")))
        start = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", _parameter(start))
        self.shared_input: SharedInput | None = None

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
            raise PaleyError(f"{name}: the slot wants codes of {slot.weight.grid!r}, but none came")
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
            raise PaleyError(f"{self.name}: the slot wants codes of {scheme.grid!r}, got {q.grid!r}")
        if (q.codes.shape[0], q.width) != (self.out_features, self.in_features):
            want, got = (self.out_features, self.in_features), (q.codes.shape[0], q.width)
            raise PaleyError(f"{self.name}: codes must have shape {want}, got {got}")
        for full, tensor in encode_linear(self.name, q).items():
            own = getattr(self, full.rpartition(".")[2])
            if own.shape != tensor.shape:
                raise PaleyError(f"{full}: must have shape {tuple(own.shape)}, got {tuple(tensor.shape)}")
            own.copy_(tensor)
        self.release_()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> the weight [out, in] in `dtype`, computed in float32."""
        scheme, codes, scales = self.slot.weight, self.codes, self.scales
        if scheme is None or codes is None or scales is None:
            assert self.weight is not None  # __init__ makes the one or the other
            return self.weight.to(dtype)
        grid = grids.load(scheme.grid)
        unpacked = unpack_weight(codes, grid, self.in_features)
        return rounding.dequantize(unpacked, scales, self.zeros, grid, self.in_features).to(dtype)

    def materialize_(self, dtype: torch.dtype = torch.float32) -> None:
        """Keeps the dense weight beside the codes, unsaved: faster, and as large as an unquantized layer."""
        if self.slot.weight is not None:
            self.dense = self.dequantize(dtype)

    def release_(self) -> None:
        """Drops the dense weight."""
        self.dense = None

    def round_input(self, x: Tensor) -> Tensor:
        """x [..., in] (transform.in_dim where there is a transform) -> what meets the weight."""
        nothing = self.slot.transform is None and self.slot.input is None
        if self.shared_input is None or nothing:
            return round_input(x, self.slot)
        return self.shared_input.round(x, self.slot)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] (in: transform.in_dim where there is a transform) -> [..., out], in x's dtype."""
        x = self.round_input(x)
        weight = self.dequantize(x.dtype) if self.dense is None else self.dense.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight, bias)

    def extra_repr(self) -> str:
        weight = self.slot.weight.grid if self.slot.weight else "float"
        inputs = self.slot.input.grid if self.slot.input else "float"
        return f"in={self.in_features}, out={self.out_features}, weight={weight}, input={inputs}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model (model.bfloat16()) must not round the scales: they follow the device only.
        scales, dense = self.scales, self.dense
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != SCALE_DTYPE:
            self.scales = scales.to(self.scales.device)
        if dense is not None and self.dense is not None and self.dense.dtype != dense.dtype:
            self.materialize_(self.dense.dtype)
        return self


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)
