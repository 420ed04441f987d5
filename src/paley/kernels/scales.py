"""The native search of weight scales. `paley.methods.nearest` has its meaning: results are equal to the bit."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.kernels import columns, native

__all__ = ["best"]

_SHARE = 2**16  # least number of values rounded by a thread: some 0.1 ms


def best(
    groups: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None, importance: Tensor | None = None, *,
    level: str | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """groups float32 [rows, groups, size], scales and zeros [rows, groups, tries] -> int64 [rows, groups, 1].

    grid: of single values. importance [groups, size]: weights of the squared errors, 1 without. -> the try that rounds
    a group with the least error, the first of equal ones.
    """
    (rows, count, size), tries = groups.shape, scales.shape[-1]
    shapes = ((rows, count, size), (rows, count, tries), (rows, count, tries), (count, size))
    for tensor, shape in zip((groups, scales, zeros, importance), shapes, strict=True):
        if tensor is not None and (tensor.dtype, tensor.device.type, tensor.shape) != (torch.float32, "cpu", shape):
            raise PaleyError(
                f"scales: the native search reads float32 {list(shape)} on the CPU, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}; convert it"
            )
    groups, scales = groups.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    importance = None if importance is None else importance.contiguous()
    found = torch.empty(rows, count, 1, dtype=torch.int32)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), groups.numel() * tries // _SHARE))
    native.call(
        native.load().paley_search_scales,
        ctypes.byref(columns.table_of(grid).raw), groups.data_ptr(), rows * count, size,
        None if importance is None else importance.data_ptr(), max(1, count),
        scales.data_ptr(), None if zeros is None else zeros.data_ptr(), tries,
        native.level_number("scales", level, native.best_level()), threads, found.data_ptr(),
    )  # fmt: skip
    return found.long()
