"""The native loops of GPTQ: a block of columns, rounded code by code. `paley.methods.columns` has their meaning."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.kernels import native

__all__ = ["MAX_DIM", "Table", "descent", "feedback", "follow_", "table_of"]

MAX_DIM = 4  # values of a code, at most
_PARTS = {2: 48, 3: 16, 4: 10}  # of each side of space, by p: some tens of members a cell at the most points
_SHARE = 2**14  # least number of values for a thread: some 0.5 ms


class _Table(ctypes.Structure):
    """paley_table of csrc/paley.h."""

    _fields_ = [
        ("points", ctypes.c_void_p), ("n", ctypes.c_int32), ("p", ctypes.c_int32), ("own", ctypes.c_int32),
        ("first", ctypes.c_float), ("step", ctypes.c_float), ("edges", ctypes.c_void_p), ("parts", ctypes.c_int32),
        ("low", ctypes.c_float * 4), ("width", ctypes.c_float * 4), ("bias", ctypes.c_void_p),
        ("starts", ctypes.c_void_p), ("members", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Table:
    """The points of codes, as the kernels read them. points float32 [n, p], or [rows, n] of each row's own."""

    points: Tensor
    edges: Tensor | None = None
    first: float = 0.0
    step: float = 0.0
    cells: tuple[Tensor, ...] = field(init=False, default=())
    raw: _Table = field(init=False, repr=False)

    @classmethod
    def of_rows(cls, points: Tensor) -> Table:
        """points [rows, n], ascending: a code is one value, and each row has its own points."""
        points = points.float().contiguous()
        return cls(points, ((points[:, 1:] + points[:, :-1]) / 2).contiguous())

    def __post_init__(self) -> None:
        own = self.edges is not None and self.edges.dim() == 2
        n, p = (self.points.shape[1], 1) if own else self.points.shape
        raw = _Table(self.points.data_ptr(), n, p, own, self.first, self.step)
        if self.edges is not None:
            raw.edges = self.edges.data_ptr()
        if p > 1:
            raw.parts = _PARTS[p]
            low, high = self.points.aminmax(dim=0)
            beyond = ((high - low) / 16).clamp(min=1e-30)  # the few vectors farther out are compared with all points
            raw.low[:p], raw.width[:p] = (low - beyond).tolist(), ((high - low + 2 * beyond) / raw.parts).tolist()
            object.__setattr__(self, "cells", _cells(raw))
            raw.bias, raw.starts, raw.members = (part.data_ptr() for part in self.cells)
        object.__setattr__(self, "raw", raw)


@functools.lru_cache(maxsize=32)
def table_of(grid: Grid) -> Table:
    """The table of a packaged or custom grid of up to MAX_DIM values a code."""
    points = grid.points.float().contiguous()
    if grid.p > 1:
        return Table(points)
    if grid.step is not None:
        return Table(points, first=float(grid.points[0]), step=grid.step)
    return Table(points, grid.edges.float().contiguous())


def _cells(raw: _Table) -> tuple[Tensor, Tensor, Tensor]:
    """bias float64 [n], starts int32 [cells + 1], members as int16 [...], the bits of uint16."""
    bias, starts = torch.empty(raw.n, dtype=torch.float64), torch.empty(raw.parts**raw.p + 1, dtype=torch.int32)
    count, room = ctypes.c_int64(0), 0
    while True:
        members = torch.empty(room, dtype=torch.int16)
        native.call(
            native.load().paley_cells,
            ctypes.byref(raw), room, bias.data_ptr(), starts.data_ptr(), members.data_ptr(), ctypes.byref(count),
        )  # fmt: skip
        if count.value <= room:
            return bias, starts, members
        room = count.value


def feedback(
    weights: Tensor, spread: Tensor, table: Table, scales: Tensor, zeros: Tensor | None, *,
    level: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weights, scales, zeros [rows, k], spread [k, k] -> codes int32 [rows, ceil(k / p)], errors [rows, k]."""
    rows, columns = weights.shape
    _check((weights, spread, scales, zeros), (weights.shape, (columns, columns), weights.shape, weights.shape))
    weights, spread = _rows(weights), spread.contiguous()
    codes = torch.empty(rows, -(-columns // table.raw.p), dtype=torch.int32)
    errors = torch.empty(rows, columns)
    native.call(
        native.load().paley_feedback,
        ctypes.byref(table.raw), rows, columns, weights.data_ptr(), weights.stride(0), spread.data_ptr(),
        *_scaling(scales, zeros), *_how(level, threads, rows * columns), codes.data_ptr(), errors.data_ptr(),
    )  # fmt: skip
    return codes, errors


def descent(
    pull: Tensor, gram: Tensor, inverse: Tensor, codes: Tensor, table: Table, scales: Tensor, zeros: Tensor | None, *,
    level: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """pull, scales, zeros [rows, k], gram [k, k], inverse [c, p, p], codes [rows, c] -> new codes, moves [rows, k]."""
    rows, columns = pull.shape
    p = table.raw.p
    _check((pull, gram, scales, zeros), (pull.shape, (columns, columns), pull.shape, pull.shape))
    _check((inverse,), ((-(-columns // p), p, p),))
    pull, gram, inverse = _rows(pull), gram.contiguous(), inverse.contiguous()
    codes = codes.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    moves = torch.empty(rows, columns)
    native.call(
        native.load().paley_descent,
        ctypes.byref(table.raw), rows, columns, pull.data_ptr(), pull.stride(0), gram.data_ptr(), inverse.data_ptr(),
        *_scaling(scales, zeros), *_how(level, threads, rows * columns), codes.data_ptr(), moves.data_ptr(),
    )  # fmt: skip
    return codes, moves


def follow_(pull: Tensor, moves: Tensor, gram: Tensor, *, level: str | None = None, threads: int | None = None) -> None:
    """pull [rows, n] -= moves [rows, k] @ gram [k, n], column by column; moves that are 0 cost nothing."""
    (rows, columns), width = moves.shape, pull.shape[1]
    _check((pull, moves, gram), ((rows, width), moves.shape, (columns, width)))
    if not pull.is_contiguous():
        raise PaleyError("columns: pull is changed in place and must be contiguous")
    moves, gram = moves.contiguous(), gram.contiguous()
    native.call(
        native.load().paley_follow,
        rows, columns, width, moves.data_ptr(), gram.data_ptr(), *_how(level, threads, rows * width), pull.data_ptr(),
    )  # fmt: skip


def _check(tensors: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> None:
    """Raises PaleyError before C reads what is not there."""
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor is None or (tensor.dtype, tensor.device.type, [*tensor.shape]) == (torch.float32, "cpu", [*shape]):
            continue
        raise PaleyError(
            f"columns: native kernels read float32 {[*shape]} on the CPU, got {tensor.dtype} {[*tensor.shape]} on "
            f"{tensor.device}; convert it"
        )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _scaling(scales: Tensor, zeros: Tensor | None) -> tuple[int | None, ...]:
    if zeros is not None and zeros.stride() != scales.stride():
        raise PaleyError("columns: scales and zeros are read by the same strides; give both expanded alike")
    return scales.data_ptr(), None if zeros is None else zeros.data_ptr(), *scales.stride()


def _how(level: str | None, threads: int | None, values: int) -> tuple[int, int]:
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), values // _SHARE))
    return native.level_number("columns", level, native.best_level()), threads
