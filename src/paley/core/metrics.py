"""Distances between tensors and between distributions."""

from __future__ import annotations

from torch import Tensor

__all__ = ["kl_divergence", "rel_error"]


def rel_error(x: Tensor, y: Tensor) -> float:
    """||x - y||^2 / ||x||^2; if x is zero, the largest |y|, which is 0 if both are zero."""
    norm = float(x.double().square().sum())
    return float((x.double() - y.double()).square().sum()) / norm if norm else float(y.abs().max())


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) over the last dimension, in nats: [..., vocab] -> [...]."""
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
