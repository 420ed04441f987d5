"""A weight [rows, columns] wherever a module of transformers holds it: in a linear, turned around, or as a stack."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["Stack", "Turned", "module_at", "put_"]


class _View:
    """Looks like a linear. What it reads and writes follows from its weight."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("in_features", "out_features"):
            super().__setattr__(name, value)


class Turned(_View):
    """transformers' Conv1D, which holds [in, out], as a linear."""

    experts = 1
    conv: Any

    def __init__(self, conv: Conv1D):
        vars(self)["conv"] = conv

    @property
    def weight(self) -> Tensor:
        return self.conv.weight.mT

    @property
    def held(self) -> nn.Parameter:
        """What holds the weight."""
        return self.conv.weight

    def as_weight(self, like: Tensor) -> Tensor:
        """A tensor like `held`, a gradient for example -> [out, in]."""
        return like.mT

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.conv.weight = nn.Parameter(value.detach().mT.contiguous(), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


class Stack(_View):
    """Experts [E, out, in] (or [E, in, out], transposed), which are a parameter of `owner`, as one linear.

    weight [E · out, in]; bias [E · out] or None. What is set must have E times as many rows as an expert.
    """

    owner: Any
    name: str
    experts: int

    def __init__(self, owner: Any, name: str):
        vars(self).update(owner=owner, name=name, experts=getattr(owner, name).shape[0])

    @property
    def weight(self) -> Tensor:
        return self.as_weight(self.held)

    @property
    def held(self) -> nn.Parameter:
        """What holds the weights."""
        return getattr(self.owner, self.name)

    def as_weight(self, like: Tensor) -> Tensor:
        """A tensor like `held`, a gradient for example -> [E · out, in]."""
        return (like.mT if self.owner.is_transposed else like).reshape(-1, self.in_features)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        stack = value.detach().unflatten(0, (self.experts, -1))
        stack = stack.mT if self.owner.is_transposed else stack
        setattr(self.owner, self.name, nn.Parameter(stack.contiguous(), requires_grad=False))

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.owner, f"{self.name}_bias").flatten() if self.owner.has_bias else None

    @bias.setter
    def bias(self, value: Tensor) -> None:
        stack = value.detach().view(self.experts, -1)
        setattr(self.owner, f"{self.name}_bias", nn.Parameter(stack, requires_grad=False))

    @property
    def in_features(self) -> int:
        return getattr(self.owner, self.name).shape[-2 if self.owner.is_transposed else -1]

    @property
    def out_features(self) -> int:
        """Of one expert."""
        return getattr(self.owner, self.name).shape[-1 if self.owner.is_transposed else -2]


def module_at(model: PreTrainedModel, path: str) -> Any:
    """The module at a path of a model; of a stack of experts, or a Conv1D, something that looks like a linear."""
    owner, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(owner)
    if isinstance(getattr(parent, name, None), nn.Parameter):
        return Stack(parent, name)
    module = model.get_submodule(path)
    return Turned(module) if isinstance(module, Conv1D) else module


def put_(model: PreTrainedModel, path: str, made: nn.Module) -> None:
    """Puts a module at a path, in place of a module or of a stack of experts."""
    owner, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(owner)
    if isinstance(getattr(parent, name, None), nn.Parameter):
        delattr(parent, name)
    setattr(parent, name, made)
