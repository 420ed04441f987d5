"""Mixtures of experts: stacks that stay packed, and what computes them, entered at transformers' own place.

In transformers a module of experts holds its weights as stacks [E, out, in], or [E, in, out], which are no modules of
their own. Here each becomes one: the rows of all experts below each other, coded as those of any other weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme, LinearScheme
from paley.model.coded import Coded
from paley.model.walk import is_experts, stacks_of
from paley.ops.inputs import round_input

__all__ = ["NAME", "QuantExperts", "experts_forward", "register_experts", "use_experts_"]

NAME = "paley"


def register_experts() -> None:
    """Makes experts_implementation="paley" known to transformers; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def use_experts_(model: PreTrainedModel) -> None:
    """Lets a model compute its experts by `experts_forward`. Errors: one that transformers cannot switch."""
    register_experts()
    for name, module in model.named_modules():
        if is_experts(module) and any(isinstance(part, QuantExperts) for part in module.children()):
            config: Any = module.config
            config._experts_implementation = NAME
            if ALL_EXPERTS_FUNCTIONS.get(config._experts_implementation) is not experts_forward:
                raise PaleyError(f"{name}: transformers does not let the experts of this model be replaced")


class QuantExperts(Coded):
    """One stack of a module of experts: y = round(T x) W_eᵀ for expert e, with W [E · out, in] as `Coded` holds it.

    in_features is the stored width: scheme.transform.out_dim if there is a transform.
    """

    def __init__(
        self, experts: int, out_features: int, in_features: int, scheme: LinearScheme, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, name: str = "QuantExperts",
    ):  # fmt: skip
        """dtype: of a stack that is left unquantized."""
        super().__init__(experts * out_features, in_features, scheme, dtype=dtype, device=device, name=name)
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.observer: Callable[[int, Tensor], None] | None = None
        self._dense: Tensor | None = None

    @classmethod
    def from_stack(cls, stack: Any, scheme: LinearScheme, q: Quantized | None, *, name: str) -> QuantExperts:
        """In place of a `Stack` or QuantExperts: with its own rows (q None), or with codes of them."""
        kept: Any = stack.weight if stack.weight is not None else stack.scales
        made = cls(
            stack.experts, stack.out_features, stack.in_features, scheme, dtype=kept.dtype, device=kept.device,
            name=name,
        )  # fmt: skip
        made.take_(q, kept)
        return made

    def prepare_(self, product: str = "auto", dtype: torch.dtype = torch.float32) -> None:
        """Writes all experts out, or, for `packed`, decodes each at every use."""
        self._dense = None
        if product != "packed" and self.scheme.weight is not None and not _is_meta(self):
            self._dense = torch.stack([self.matrix(e, dtype) for e in range(self.experts)])

    def set_input_(self, scheme: ActivationScheme | None) -> None:
        """Rounds the input so from now on, or not at all."""
        self.scheme = replace(self.scheme, input=scheme)

    def matrix(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> [out, in]: what expert `expert` multiplies by, in the transform's coordinates."""
        if self._dense is not None:
            return self._dense[expert].to(dtype)
        rows = slice(expert * self.out_features, (expert + 1) * self.out_features)
        if self.weight is not None:
            return self.weight[rows].to(dtype)
        q = self.quantized(rows)
        assert q is not None
        return q.dequantize(dtype)

    def round_input(self, x: Tensor) -> Tensor:
        """x [..., in] (transform.in_dim if there is a transform) -> what meets the weight."""
        return round_input(x, self.scheme, None, None)

    def multiply(self, expert: int, x: Tensor) -> Tensor:
        """x [tokens, in] of one expert -> [tokens, out], in x's dtype."""
        rounded = self.round_input(x)
        if self.observer is not None:
            self.observer(expert, rounded)
        return linear(rounded, self.matrix(expert, x.dtype))

    def retire_(self) -> None:
        """Lets go of what was made ready."""
        self._dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dense = None if self._dense is None else fn(self._dense)
        return super()._apply(fn, recurse)


def experts_forward(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers' own functions for experts: hidden [tokens, hidden], top_k_index and top_k_weights [tokens, k]
    -> the weighted sum of what each token's experts make of it.
    """
    first, second = stacks_of(experts)
    result = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < experts.num_experts:  # no expert: transformers marks masked places so
            continue
        tokens, places = torch.where(top_k_index == expert)
        x = _times(experts, first, expert, hidden[tokens])
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = _times(experts, second, expert, x)
        if getattr(experts, "has_post_expert_norm", False):  # older releases of transformers know none
            x = experts.post_expert_norm(x)
        result.index_add_(0, tokens, (x * top_k_weights[tokens, places, None]).to(result.dtype))
    return result


def _times(experts: Any, part: str, expert: int, x: Tensor) -> Tensor:
    stack = getattr(experts, part)
    if isinstance(stack, QuantExperts):
        y = stack.multiply(expert, x)
    else:
        weight = stack[expert].mT if experts.is_transposed else stack[expert]
        y = linear(x, weight.to(x.dtype))
    return y + getattr(experts, f"{part}_bias")[expert].to(x.dtype) if experts.has_bias else y


def _is_meta(module: Coded) -> bool:
    return any(t.is_meta for t in module.buffers())
