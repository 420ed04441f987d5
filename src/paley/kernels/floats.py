"""Float32 linears by oneDNN, where MKL uses half of the processor.

PyTorch multiplies float32 by MKL, whose AVX-512 code runs on Intel's processors alone; oneDNN, which PyTorch brings as
well, has such code for all: 230 in place of 104 GFLOP/s on a core of an AMD EPYC (Zen 5). Sums are float32 in another
order, and the same for any number of threads or of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["QuickProducts", "are_quicker", "quickly"]

P = ParamSpec("P")
R = TypeVar("R")

_ROWS = 8  # of fewer, memory bounds the product
_LINEAR = torch.nn.functional.linear


class QuickProducts(TorchFunctionMode):
    """While active, `torch.nn.functional.linear` of float32 on the CPU goes to oneDNN, if it needs no gradients."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _LINEAR and not kwargs and are_quicker() and _takes(*args):
            return _product(*args)
        return func(*args, **(kwargs or {}))


def quickly(work: Callable[P, R]) -> Callable[P, R]:
    """A function that computes with `QuickProducts`, where they are quicker."""

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with QuickProducts() if are_quicker() else nullcontext():  # a mode costs each call of torch a microsecond
            return work(*args, **kwargs)

    return wrapped


@functools.cache
def are_quicker() -> bool:
    """Whether this machine and this PyTorch gain by it."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _vendor() not in ("", "GenuineIntel")
    )


def _vendor() -> str:
    """Of the processor, as Linux has it; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        weight.dim() == 2
        and x.numel() >= _ROWS * x.shape[-1] > 0
        and weight.numel() > 0
        and weight.shape[1] == x.shape[-1]
        and (weight.is_contiguous() or weight.T.is_contiguous())  # a part of a matrix takes it a thousand times as long
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> x Wᵀ + bias [..., out]"""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
