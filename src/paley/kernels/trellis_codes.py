"""The native search for codes of a trellis-coded grid. `paley.core.viterbi` has its meaning."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.viterbi import check
from paley.kernels import native

__all__ = ["codes", "values"]

_SHARE = 2**10  # least number of values for a thread: some 0.5 ms
_DECODED_SHARE = 2**17  # likewise, of those that are only decoded: some 0.2 ms


class _Trellis(ctypes.Structure):
    """paley_trellis of csrc/paley.h."""

    _fields_ = [
        ("points", ctypes.c_void_p), ("levels", ctypes.c_void_p), ("costs", ctypes.c_void_p),
        ("level_count", ctypes.c_int32), ("state_bits", ctypes.c_int32), ("bits", ctypes.c_int32),
        ("p", ctypes.c_int32), ("unit", ctypes.c_float),
    ]  # fmt: skip


def codes(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int, *,
    level: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `core.viterbi.reference`, for float32 tensors on the CPU; the same codes and bits."""
    check(x, columns, scales, table, levels, costs, bits, states, ends, spread, keep, ahead)
    if x.device.type != "cpu":
        raise PaleyError(f"trellis: native kernels read tensors on the CPU, got {x.device}; convert them")
    (rows, wide), (p, size) = x.shape, table.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    table, levels, costs = (tensor.contiguous() for tensor in (table, levels, costs))
    spread, ends = (None if tensor is None else tensor.contiguous() for tensor in (spread, ends))
    states = states.clone()
    found = torch.empty(rows, -(-columns // p), dtype=torch.int32)
    errors = torch.empty(rows, columns if spread is not None else 0)
    trellis = _Trellis(
        table.data_ptr(), levels.data_ptr(), costs.data_ptr(), costs.shape[1], size.bit_length() - 1, bits, p, unit
    )
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), rows * columns // _SHARE))
    native.call(
        native.load().paley_trellis_codes,
        ctypes.byref(trellis), rows, columns, wide, x.data_ptr(), x.stride(0), _address(spread), scales.data_ptr(),
        *scales.stride(), keep, ahead, native.level_number("trellis", level, native.best_level()), threads,
        _address(ends), states.data_ptr(), found.data_ptr(), None if spread is None else errors.data_ptr(),
    )  # fmt: skip
    return found, states, errors


def values(codes: Tensor, table: Tensor, bits: int, *, threads: int | None = None) -> Tensor:
    """As `core.viterbi.reference_values`, on the CPU; the same bits."""
    (rows, steps), (p, size) = codes.shape, table.shape
    codes, table = codes.to(torch.uint8).contiguous(), table.contiguous()
    found = torch.empty(rows, steps, p)
    trellis = _Trellis(table.data_ptr(), None, None, 0, size.bit_length() - 1, bits, p, 0.0)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), rows * steps // _DECODED_SHARE))
    native.call(
        native.load().paley_trellis_values,
        ctypes.byref(trellis), rows, steps, codes.data_ptr(), threads, found.data_ptr(),
    )  # fmt: skip
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
