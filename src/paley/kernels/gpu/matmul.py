"""y = x · Ŵᵀ in Triton, straight from packed codes of one or two values. `paley.ops.matmul.grid_matmul` is its meaning.

A program makes a tile of outputs. The grid's points are looked up in a table that all its threads share; inputs and
points are multiplied in the inputs' type and summed in float32, group by group, and the group's scale multiplies the
sum: y[t, r] = sum over groups g of scale[r, g] · (sum over columns c of g of x[t, c] · (point[r, c] - zero[r, g])).
Codes stay as the file has them, so a weight takes its own bytes in the GPU's memory and no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.core.schemes import LinearScheme
from paley.kernels.stored import StoredWeight

__all__ = ["GpuMatrix", "matmul", "prepare", "takes"]

_MOST_POINTS = 2**12
_ROWS = 32  # of a weight for a program
_CODES = 64  # of a row at a time, at most


@triton.jit
def _unpacked(pointer, row_bytes, rows, codes, mask, BITS: tl.constexpr):
    """Codes number `codes` [1, C] of the rows [R, 1], int32 [R, C]; up to 16 bits each, least significant first."""
    bit = codes * BITS
    at = pointer + rows.to(tl.int64) * row_bytes + bit // 8
    word = tl.load(at, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may lie in two bytes or in three
        bytes_of_row = codes * 0 + row_bytes
        more = mask & (bit // 8 + 1 < bytes_of_row)
        word |= tl.load(at + 1, mask=more, other=0).to(tl.int32) << 8
    if BITS > 9:
        bytes_of_row = codes * 0 + row_bytes
        more = mask & (bit // 8 + 2 < bytes_of_row)
        word |= tl.load(at + 2, mask=more, other=0).to(tl.int32) << 16
    return (word >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def _points(table, codes, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """codes [R, C] -> table[codes]; table [SIZE] lies in shared memory."""
    return tl.reshape(tl.gather(table, tl.reshape(codes, (R * C,)), 0), (R, C))


@triton.jit
def _matmul(
    x, codes, table, scales, zeros, y, tokens, out, row_bytes, groups, group_codes,
    BITS: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, AFFINE: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x [P, tokens, groups · group_codes]: the first values of all codes, then the second ones. y [tokens, out]."""
    rows, tokens_at = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * M + tl.arange(0, M)
    row_mask, token_mask = rows < out, tokens_at < tokens
    kind: tl.constexpr = x.dtype.element_ty
    width = groups * group_codes
    entries = tl.arange(0, SIZE)
    first = tl.load(table + P * entries).to(kind)
    second = tl.load(table + P * entries + (P - 1)).to(kind)
    total = tl.zeros((M, R), dtype=tl.float32)
    for g in range(groups):
        part = tl.zeros((M, R), dtype=tl.float32)
        sums = tl.zeros((M,), dtype=tl.float32)
        for start in range(0, group_codes, C):
            inside = start + tl.arange(0, C)
            at, mask = g * group_codes + inside, inside < group_codes
            found = _unpacked(codes, row_bytes, rows[:, None], at[None, :], row_mask[:, None] & mask[None, :], BITS)
            seen = token_mask[:, None] & mask[None, :]
            place = tokens_at[:, None].to(tl.int64) * width + at[None, :]
            a = tl.load(x + place, mask=seen, other=0.0)
            w = _points(first, found, SIZE, R, C)
            if M == 1:
                part += tl.sum(a.to(tl.float32) * w.to(tl.float32), 1)[None, :]
            else:
                part = tl.dot(a, tl.trans(w), part, input_precision="ieee")
            if AFFINE:
                sums += tl.sum(a.to(tl.float32), 1)
            if P == 2:
                b = tl.load(x + (place + tokens * width), mask=seen, other=0.0)
                v = _points(second, found, SIZE, R, C)
                if M == 1:
                    part += tl.sum(b.to(tl.float32) * v.to(tl.float32), 1)[None, :]
                else:
                    part = tl.dot(b, tl.trans(v), part, input_precision="ieee")
        if AFFINE:
            zero = tl.load(zeros + rows * groups + g, mask=row_mask, other=0).to(tl.float32)
            part -= sums[:, None] * zero[None, :]
        total += part * tl.load(scales + rows * groups + g, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    place = tokens_at[:, None].to(tl.int64) * out + rows[None, :]
    tl.store(y + place, total.to(kind), mask=token_mask[:, None] & row_mask[None, :])


@dataclass(frozen=True, eq=False)
class GpuMatrix:
    """A weight [out, width] on the device that multiplies it. table float32 [size, p]."""

    codes: Tensor = field(repr=False)
    table: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)
    zeros: Tensor | None = field(repr=False)
    bits: int
    out: int
    width: int


def takes(scheme: LinearScheme, width: int) -> bool:
    """Grids of up to two values a code, whose number of points is a power of two; no outliers."""
    if scheme.weight is None or scheme.outliers:
        return False
    grid, group = scheme.weight.grid, scheme.weight.group_size or width
    if not isinstance(grid, Grid) or grid.p > 2 or group % grid.p or not 4 <= grid.size <= _MOST_POINTS:
        return False
    return packing.symbol(grid.size) == (1, grid.size.bit_length() - 1)


def prepare(q: StoredWeight) -> GpuMatrix:
    """A weight whose scheme `takes` accepts, on the device of its codes."""
    grid = q.grid
    assert isinstance(grid, Grid)
    table = grid.points.to(q.codes.device, torch.float32).contiguous()
    zeros = None if q.zeros is None else q.zeros.contiguous()
    return GpuMatrix(
        q.codes.contiguous(), table, q.scales.half().contiguous(), zeros, grid.size.bit_length() - 1, len(q.codes),
        q.width,
    )  # fmt: skip


def matmul(x: Tensor, matrix: GpuMatrix) -> Tensor:
    """x [tokens, width] of any float type, as it meets the weight -> [tokens, out] in that type."""
    if x.dim() != 2 or x.shape[1] != matrix.width or x.device != matrix.codes.device or not x.is_floating_point():
        raise PaleyError(
            f"matmul: Triton kernels read floats [tokens, {matrix.width}] on {matrix.codes.device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}; convert it"
        )
    tokens, (size, p), groups = len(x), matrix.table.shape, matrix.scales.shape[1]
    y = torch.empty(tokens, matrix.out, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    apart = x.contiguous() if p == 1 else x.reshape(tokens, -1, p).permute(2, 0, 1).contiguous()
    group_codes = matrix.width // groups // p
    tile = 1 if tokens == 1 else min(64, max(16, triton.next_power_of_2(tokens)))
    at_a_time = min(_CODES, max(16, triton.next_power_of_2(group_codes)))
    zeros = matrix.scales if matrix.zeros is None else matrix.zeros  # not read
    kernel: Any = _matmul
    kernel[triton.cdiv(matrix.out, _ROWS), triton.cdiv(tokens, tile)](
        apart, matrix.codes, matrix.table, matrix.scales, zeros, y, tokens, matrix.out, matrix.codes.shape[1], groups,
        group_codes, BITS=matrix.bits, SIZE=size, P=p, AFFINE=matrix.zeros is not None, M=tile, R=_ROWS, C=at_a_time,
    )  # fmt: skip
    return y
