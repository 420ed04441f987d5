"""The native product of matrices whose entries are rounded to bfloat16. `paley.core.products` has its meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.kernels import native

__all__ = ["BFLOAT16", "best_level", "products"]

BFLOAT16 = ("avx512_bf16", "amx_bf16")  # levels with instructions for it, 2 and 10 times as fast as float32
_SHARE = 2**23  # least number of multiplications for a thread: some 0.1 ms


def best_level() -> str:
    """The best of LEVELS on this machine; one of BFLOAT16 if it has instructions for that."""
    return native.LEVELS[native.load().paley_best_products_level()]


def products(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, upper: bool = False,
    level: str | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """As `core.products.reference`, on the CPU: the same bits with any number of threads and on every level.

    "amx_bf16" has those of its `tiles`.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise PaleyError(f"products: needs a [m, k] and b [n, k], got {list(a.shape)} and {list(b.shape)}")
    (m, k), n = a.shape, len(b)
    add = out is not None
    out = torch.empty(m, n) if out is None else out
    for name, x in (("a", a), ("b", b), ("out", out)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise PaleyError(f"products: {name} must be float32 on the CPU, got {x.dtype} on {x.device}; convert it")
    if out.shape != (m, n) or not out.is_contiguous():
        raise PaleyError(f"products: out must be contiguous [{m}, {n}], got {list(out.shape)}")
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), m * n * k // _SHARE))
    native.call(
        native.load().paley_products,
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), m, n, k, add, upper,
        native.level_number("products", level, best_level()), threads, out.data_ptr(),
    )  # fmt: skip
    return out
