"""ggml's block types: a row in blocks of 32 values, codes of 4, 5 or 8 bits with their float16 scale and offset.

A value is d · (c - zero), or d · c + m where a type has an offset; d may be negative. `fitting` finds the type that
holds what a grid stands for, `pack` makes the bytes from the very codes and scales of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core.grids import AnyGrid, Grid
from paley.core.rounding import Quantized

__all__ = ["BLOCK", "TYPES", "BlockType", "fitting", "pack"]

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """name: ggml's. bits of a code. zero: the code of the value 0; None: each block has an offset instead."""

    name: str
    bits: int
    zero: int | None

    @property
    def block_bytes(self) -> int:
        return 2 + 2 * (self.zero is None) + BLOCK * self.bits // 8

    def holds(self, low: int, high: int) -> bool:
        """Whether it has the multiples low to high of a scale, or, with a sign, those from -high to -low."""
        if self.zero is None:
            return high - low < 2**self.bits
        least, most = -self.zero, 2**self.bits - 1 - self.zero
        return (least <= low and high <= most) or (least <= -high and -low <= most)


TYPES = (
    BlockType("Q4_0", 4, 8), BlockType("Q4_1", 4, None), BlockType("Q5_0", 5, 16), BlockType("Q5_1", 5, None),
    BlockType("Q8_0", 8, 128),
)  # fmt: skip


def fitting(grid: AnyGrid, zeros: Tensor | None) -> BlockType | None:
    """The smallest type that has every value of the grid; zeros: those that a weight's groups have. None: no type."""
    if not isinstance(grid, Grid) or grid.step is None:
        return None
    first, steps = _first(grid), grid.size - 1
    if first is None:  # no multiple of the step is 0, as of the odd numbers: only an offset reaches them
        return next((kind for kind in TYPES if kind.zero is None and steps < 2**kind.bits), None)
    found = [0] if zeros is None else [int(zeros.min()), int(zeros.max())]
    ranges = [(first - zero, first - zero + steps) for zero in found]
    return next((kind for kind in TYPES if all(kind.holds(*ends) for ends in ranges)), None)


def _first(grid: Grid) -> int | None:
    """The grid's first point in steps; None if it is no whole number of them."""
    assert grid.step is not None
    first = float(grid.points[0]) / grid.step
    return round(first) if first == round(first) else None


def pack(q: Quantized, kind: BlockType) -> Tensor:
    """codes [out, in], scales [out, groups] -> uint8 [out, in / 32 · block_bytes]: the bytes of ggml's blocks.

    Groups are of whole blocks. Values are those of q to the bit, but for the rounding of an offset to float16.
    """
    assert isinstance(q.grid, Grid)
    assert q.grid.step is not None
    rows, blocks = len(q.codes), q.width // BLOCK
    repeat = q.group_size // BLOCK
    codes = q.codes.view(rows, blocks, BLOCK).int()
    scales = q.scales.repeat_interleave(repeat, 1).float()[..., None] * q.grid.step
    zeros = 0 if q.zeros is None else q.zeros.repeat_interleave(repeat, 1).int()[..., None]
    first = _first(q.grid)
    if kind.zero is None:
        start = float(q.grid.points[0]) - zeros  # the value of code 0, in scales
        offsets = scales / q.grid.step * start
        return _joined(_halves(scales), _halves(offsets), _payload(codes, kind.bits))
    assert first is not None
    levels = codes + first - zeros
    low = first - zeros if isinstance(zeros, Tensor) else torch.full_like(scales, first).int()
    fits = (low >= -kind.zero) & (low + q.grid.size - 1 < 2**kind.bits - kind.zero)
    sign = torch.where(fits, 1, -1)
    if kind.bits == 8:
        return _joined(_halves(scales * sign), (levels * sign).to(torch.int8).view(torch.uint8))
    return _joined(_halves(scales * sign), _payload(levels * sign + kind.zero, kind.bits))


def _halves(x: Tensor) -> Tensor:
    """x [rows, blocks, 1] -> its float16 bytes [rows, blocks, 2]."""
    return x.half().contiguous().view(torch.uint8)


def _payload(codes: Tensor, bits: int) -> Tensor:
    """codes [rows, blocks, 32] of 4 or 5 bits -> bytes: the fifth bits of all, then values i and i + 16 in a byte."""
    low = codes & 15
    nibbles = (low[..., :16] | low[..., 16:] << 4).to(torch.uint8)
    if bits == 4:
        return nibbles
    fifth = (codes >> 4 & 1).unflatten(-1, (4, 8)) << torch.arange(8)
    return torch.cat([fifth.sum(-1).to(torch.uint8), nibbles], -1)


def _joined(*parts: Tensor) -> Tensor:
    """Parts [rows, blocks, bytes] -> [rows, bytes]."""
    return torch.cat(parts, -1).flatten(1)
