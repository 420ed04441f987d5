"""Kernels in Triton for GPUs. `paley.ops` has their meaning; the modules beside this one import triton.

Triton's interpreter runs them on the CPU if TRITON_INTERPRET=1 is set before they are first imported. It is slow, and
for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["chosen", "interpreted", "runs_on", "why_not"]


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not() -> str | None:
    """Why no Triton kernel runs here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; PyTorch for CUDA brings it"
    if not interpreted() and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels take tensors of this device: a GPU's, or the CPU's if they are interpreted."""
    return device.type == ("cpu" if interpreted() else "cuda") and why_not() is None


def chosen(device: torch.device) -> bool:
    """Whether they are taken there without being asked for by name: if PALEY_TRITON=1, as no GPU has measured them."""
    return os.environ.get("PALEY_TRITON") == "1" and runs_on(device)
