"""A linear layer that keeps its weight packed: what replaces nn.Linear in a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paley.core.rounding import Quantized, check_groups
from paley.core.schemes import ActivationScheme, LinearScheme
from paley.model.coded import Coded, parameter
from paley.ops.inputs import SharedInput, round_input
from paley.ops.matmul import Dense, Packed, Product, choose

__all__ = ["QuantLinear"]


class QuantLinear(Coded):
    """y = round(T x) W^T + b, with W [out_features, in_features] as `Coded` holds it.

    in_features is the stored width: scheme.transform.out_dim if there is a transform.
    """

    bias: nn.Parameter | None
    diagonal: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: LinearScheme,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        name: str = "QuantLinear",
    ):
        """dtype: of the bias, and of a weight left unquantized."""
        super().__init__(out_features, in_features, scheme, dtype=dtype, device=device, name=name)
        self.in_features, self.out_features = in_features, out_features
        if scheme.input is not None:
            check_groups(in_features, scheme.input.group_size, f"{name}: input")
        start = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", parameter(start))
        self.shared_input: SharedInput | None = None
        self.diagonal_key = 0
        self.product: Product = Packed(self, dtype)

    @classmethod
    def from_linear(
        cls, linear: Any, scheme: LinearScheme, q: Quantized | None, *, name: str = "QuantLinear"
    ) -> QuantLinear:
        """Takes the bias of an nn.Linear or QuantLinear, and its weight if the scheme leaves that (q None)."""
        out_features, in_features = linear.out_features, linear.in_features
        if q is not None and not issubclass(type(linear), Coded):  # which is not turned yet
            in_features = scheme.stored_width(in_features)
        kept = linear.weight if linear.weight is not None else linear.scales
        bias = linear.bias is not None
        made = cls(
            in_features, out_features, bias=bias, scheme=scheme, dtype=linear.bias.dtype if bias else kept.dtype,
            device=kept.device, name=name,
        )  # fmt: skip
        made.take_(q, kept)
        if bias:
            made.bias = parameter(linear.bias.detach().clone())
        if scheme.diagonal and getattr(linear, "diagonal", None) is not None:
            made.diagonal, made.diagonal_key = linear.diagonal, linear.diagonal_key
        return made

    def prepare_(self, product: str = "auto", dtype: torch.dtype = torch.float32) -> None:
        """Chooses how the weight is multiplied from now on (see `paley.ops.matmul.choose`)."""
        self.product = choose(self, self.in_features, self._device(), dtype, product)
        self._chosen = (product, dtype)

    def retire_(self) -> None:
        """Lets go of a weight in float, and of what was made ready, for good.

        Forwards that stand still hold a layer that was replaced, and a layer and its product hold each other.
        """
        self.weight = None
        del self.product

    def set_quantized_(self, q: Quantized) -> None:
        """As of `Coded`; what was made ready of other codes is made anew."""
        super().set_quantized_(q)
        self._renew_()

    def _renew_(self) -> None:
        if not isinstance(self.product, Packed):
            self.prepare_(*self._chosen)

    def set_input_(self, scheme: ActivationScheme | None) -> None:
        """Rounds the input so from now on, or not at all; weight and transform stay."""
        self.scheme = replace(self.scheme, input=scheme)
        if not self.product.fits(self.scheme):
            self.prepare_(*self._chosen)

    @property
    def plain_width(self) -> int:
        """Values that the layer reads, before its transform."""
        return self.in_features if self.scheme.transform is None else self.scheme.transform.in_dim

    def plain_weight(self) -> Tensor:
        """-> [out, plain_width]: the weight that the layer's input meets, its transform and diagonal undone."""
        weight = self.dequantize(torch.float64)
        if self.scheme.transform is not None:
            weight = self.scheme.transform.adjoint(weight)
        return weight if self.diagonal is None else weight / self.diagonal.double()

    def scale_columns_(self, diagonal: Tensor, plain: Tensor | None = None) -> None:
        """Gives an unquantized layer this diagonal [plain_width]; what it computes stays the same.

        plain: `plain_weight()`, if it is at hand.
        """
        assert self.weight is not None
        assert self.scheme.transform is not None
        plain = self.plain_weight() if plain is None else plain
        weight = self.scheme.transform.apply(plain * diagonal.double())
        self.weight = parameter(weight.to(self.weight.dtype))
        self.diagonal = diagonal.clone()  # files have one for each layer, and transformers refuses to save shared ones
        self._renew_()

    def round_input(self, x: Tensor) -> Tensor:
        """x [..., in] (transform.in_dim if there is a transform) -> what meets the weight."""
        return round_input(x, self.scheme, self.outlier_columns, self.diagonal)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """x [..., in] -> (x', W, bias) of y = x' Wᵀ + bias, to multiply some rows of W alone; None if W is in codes."""
        product = self.product
        return (product.encode(x), product.weight, self.bias) if isinstance(product, Dense) else None

    @torch.compiler.disable  # native kernels, and an input that layers share, are nothing that can be traced
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [..., in] (in: transform.in_dim if there is a transform) -> [..., out], in x's dtype."""
        product = self.product
        if self.shared_input is None:
            encoded = product.encode(x)
        else:
            encoded = self.shared_input.take(self, x, product.how, product.encode)
        y = product.run(encoded, x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        weight = self.scheme.weight.grid.name if self.scheme.weight else "float"
        inputs = self.scheme.input.grid.name if self.scheme.input else "float"
        return f"in={self.in_features}, out={self.out_features}, weight={weight}, input={inputs}"

    @property
    def qweight(self) -> Tensor:
        """The codes, or an unquantized weight, by the name under which peft looks for a device."""
        kept = self.codes if self.codes is not None else self.weight
        assert kept is not None
        return kept

    def _device(self) -> torch.device:
        return self.qweight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not isinstance(self.product, Packed):  # what was made ready is on the old device, or of the old type
            product, dtype = self._chosen
            self.prepare_(product, fn(torch.zeros((), dtype=dtype)).dtype)
        return self
