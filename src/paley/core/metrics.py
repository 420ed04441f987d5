"""Distances between tensors and between distributions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["kl_divergence", "rel_error", "rel_error_of"]


def rel_error(x: Tensor, y: Tensor) -> float:
    """||x - y||^2 / ||x||^2; if x is zero, the largest |y|, which is 0 if both are zero."""
    return rel_error_of([(x, y)])


def rel_error_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """As `rel_error`, of tensors that come in parts, (x, y) each, so that not all of both is there at once."""
    norm = off = most = 0.0
    for x, y in pairs:
        norm += float(x.double().square().sum())
        off += float((x.double() - y.double()).square().sum())
        most = max(most, float(y.abs().max()))
    return off / norm if norm else most


_VALUES = 2**19  # of logits that are compared at a time: what is made of them stays in the processor's caches


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) over the last dimension, in nats: both [..., vocab] -> [...]."""
    if logits.shape != other.shape:
        raise PaleyError(f"KL: needs logits of one shape, got {list(logits.shape)} and {list(other.shape)}")
    if logits.device.type != "cpu":
        return _divergences(logits, other)
    few = max(torch.get_num_threads(), _VALUES // logits.shape[-1])
    parts = (x.reshape(-1, x.shape[-1]).split(few) for x in (logits, other))
    return torch.cat([_divergences(p, q) for p, q in zip(*parts, strict=True)]).view(logits.shape[:-1])


def _divergences(logits: Tensor, other: Tensor) -> Tensor:
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
