"""Rewrites a model's weights in an equal one's coordinates: norms folded, residual stream rotated and widened.

Every step leaves the logits as they were (QuaRot, arXiv:2404.00456; expansion: arXiv:2504.13989, section 4).
All products are taken in float64 and cast once, for folding in 16 bits drifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paley.core.transforms import Transform
from paley.model.adapter import Adapter, Block

__all__ = ["fold_norms_", "rotate_input_", "rotate_residual_", "rotate_values_", "untie_"]


def _set(linear: Any, name: str, value: Tensor) -> None:
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.to(old.dtype), requires_grad=False))


def _map_inputs_(linear: Any, f: Callable[[Tensor], Tensor]) -> None:
    """weight [out, in] <- f along its rows."""
    _set(linear, "weight", f(linear.weight.double()))
    if isinstance(linear, nn.Linear):
        linear.in_features = linear.weight.shape[1]


def _map_outputs_(linear: Any, f: Callable[[Tensor], Tensor]) -> None:
    """weight [out, in] <- f along its columns, and along the bias."""
    _set(linear, "weight", f(linear.weight.double().T).T.contiguous())
    if linear.bias is not None:
        _set(linear, "bias", f(linear.bias.double()))
    linear.out_features = linear.weight.shape[0]


def untie_(adapter: Adapter) -> None:
    """Gives lm_head a weight of its own where it shares the embedding's: the final norm folds into one only."""
    head, embedding = adapter.part("head"), adapter.part("embedding")
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    adapter.model.config.tie_word_embeddings = False


def _fold_norm_(norm: Any, linears: list[Any]) -> None:
    gain = norm.weight.double()
    for linear in linears:
        _map_inputs_(linear, lambda w: w * gain)
    _set(norm, "weight", torch.ones_like(norm.weight))


def fold_norms_(adapter: Adapter) -> None:
    """Moves every RMSNorm's gain into the linears that read it. Untie first."""
    for block in adapter.blocks:
        _fold_norm_(block.part("attention_norm"), [block.part(r) for r in ("q", "k", "v")])
        _fold_norm_(block.part("mlp_norm"), [block.part(r) for r in ("gate", "up")])
    _fold_norm_(adapter.part("norm"), [adapter.part("head")])


def rotate_residual_(adapter: Adapter, transform: Transform) -> None:
    """R1, and dimension expansion where it widens. Fold the norms first.

    RMSNorm over n' > n columns sees a mean square smaller by n/n': sqrt(n/n') goes into the linears behind it,
    and eps shrinks by n/n'.
    """
    n, wide = transform.in_dim, transform.out_dim
    shrink = math.sqrt(n / wide)
    embedding = adapter.part("embedding")
    _map_inputs_(embedding, transform.apply)
    embedding.embedding_dim = wide
    norms = [adapter.part("norm")]
    for block in adapter.blocks:
        for role in ("q", "k", "v", "gate", "up"):
            _map_inputs_(block.part(role), lambda w: transform.apply(w) * shrink)
        for role in ("o", "down"):
            _map_outputs_(block.part(role), transform.apply)
        norms += [block.part("attention_norm"), block.part("mlp_norm")]
        for role, norm in block.head_norms():
            # The config holds one eps for all norms: shrinking what this one reads as well keeps it exact.
            _map_outputs_(block.part(role), lambda w: w * shrink)
            norm.variance_epsilon *= n / wide
    _map_inputs_(adapter.part("head"), lambda w: transform.apply(w) * shrink)
    for norm in norms:
        norm.weight = nn.Parameter(norm.weight.new_ones(wide), requires_grad=False)
        norm.variance_epsilon *= n / wide
    config = adapter.model.config
    if getattr(config, "head_dim", None) is None:
        config.head_dim = adapter.head_dim
    config.hidden_size = wide
    config.rms_norm_eps *= n / wide


def rotate_values_(block: Block, transform: Transform) -> None:
    """R2: each head's values rotated in v_proj's outputs (and bias), undone in o_proj's inputs."""
    per_head = lambda w: transform.apply(w.unflatten(-1, (-1, transform.in_dim))).flatten(-2)  # noqa: E731
    _map_outputs_(block.part("v"), per_head)
    _map_inputs_(block.part("o"), per_head)


def rotate_input_(linear: Any, transform: Transform) -> None:
    """R4 and its like: a linear's input columns rotated; its input must get the same transform at run time."""
    _map_inputs_(linear, transform.apply)
