"""The product of two matrices whose entries are rounded to bfloat16, with float32 sums in one order.

Sums over the tokens of a calibration text go by it on the CPU: of the same inputs they are the same with any number of
threads, on every machine without AMX, and without the native kernels (`paley.kernels.products`), which must agree with
this code. AMX is ten times as fast and sums in an order of its own: `tiles`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]

RUN = 512  # values that are summed from 0 before they are added to the rest, as in csrc/products_tiles.h
_STEP = 32  # values that a tile of AMX sums at once


def reference(a: Tensor, b: Tensor, out: Tensor | None = None, *, upper: bool = False, tiles: bool = False) -> Tensor:
    """a [m, k], b [n, k], float32 -> a bᵀ [m, n]; added to `out`, in place, if that is given.

    upper: what is below the diagonal is not wanted, and may be anything. Numbers below the least normal one count as 0.
    Values are summed by pairs, the second one first: so does the instruction for pairs of bfloat16.
    tiles: as AMX does it (Intel's SDM, TDPBF16PS): of 32 values the even ones are summed from 0, and the odd ones, and
    the sum of both is added.
    """
    a, b = _rounded(a), _rounded(b)
    for start in range(0, a.shape[1], RUN):
        stop, sums = min(start + RUN, a.shape[1]), a.new_zeros(len(a), len(b))
        if tiles:
            for step in range(start, stop, _STEP):
                parts = torch.zeros(2, *sums.shape)
                for column in range(step, min(step + _STEP, stop)):
                    parts[column % 2].addr_(a[:, column], b[:, column])
                sums += parts[0] + parts[1]
        else:
            for even in range(start, stop, 2):
                if even + 1 < stop:
                    sums.addr_(a[:, even + 1], b[:, even + 1])
                sums.addr_(a[:, even], b[:, even])
        out = sums if out is None else out.add_(sums)
    return a.new_zeros(len(a), len(b)) if out is None else out


def _rounded(x: Tensor) -> Tensor:
    small = x.abs() < torch.finfo(torch.float32).tiny
    return torch.where(small, torch.zeros_like(x).copysign(x), x.bfloat16().float())
