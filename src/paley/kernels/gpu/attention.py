"""Attention over packed keys and values in Triton. `paley.ops.attention.kv_attention` is its meaning.

A program takes the queries that read one head of keys, and a share of its tokens. Codes are decoded as they are read,
block by block, with a running softmax (flash attention, arXiv:2205.14135); shares are joined afterwards (flash
decoding). The cache is never written out.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from paley.core import packing
from paley.core.grids import Grid
from paley.core.schemes import ActivationScheme
from paley.kernels.gpu.matmul import _points, _unpacked

__all__ = ["PackedSide", "attention", "takes"]

_TOKENS = 64  # of a block
_SHARE = 1024  # tokens of a program, at most
_MOST_ROWS = 64  # queries of a program


class PackedSide(Protocol):
    """As `paley.ops.attention.PackedKV`."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def zeros(self) -> Tensor | None: ...
    @property
    def width(self) -> int: ...
    @property
    def scheme(self) -> ActivationScheme: ...


@triton.jit
def _decoded(
    codes, scales, zeros, table, rows, columns, mask, row_bytes, groups, group,
    BITS: tl.constexpr, SIZE: tl.constexpr, AFFINE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Values of the rows [R] at the columns [C] -> float32 [R, C]; zeros where mask [R, C] is false."""
    found = _unpacked(codes, row_bytes, rows[:, None], columns[None, :], mask, BITS)
    at = rows[:, None].to(tl.int64) * groups + (columns // group)[None, :]
    values = _points(table, found, SIZE, R, C)
    if AFFINE:
        values -= tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    return values * tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _attend(
    q, keys, key_scales, key_zeros, key_table, values, value_scales, value_zeros, value_table, mask, sums, parts,
    rows, tokens, kv_heads, share, scaling, key_width, value_width, key_bytes, value_bytes, key_groups, value_groups,
    key_group, value_group, mask_batch, mask_head,
    KEY_BITS: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_AFFINE: tl.constexpr, VALUE_BITS: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_AFFINE: tl.constexpr, MASKED: tl.constexpr, Q: tl.constexpr, T: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """q [batch · kv_heads, rows, key_width]; mask [.., rows, tokens], added; sums [programs, shares, rows, 2] float32:
    the largest score and the sum of exponentials; parts [programs, shares, rows, value_width] float32."""
    head, number, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    queries, k_columns, v_columns = tl.arange(0, Q), tl.arange(0, DK), tl.arange(0, DV)
    query_mask, k_mask, v_mask = queries < rows, k_columns < key_width, v_columns < value_width
    place = (head.to(tl.int64) * rows + queries[:, None]) * key_width + k_columns[None, :]
    x = tl.load(q + place, mask=query_mask[:, None] & k_mask[None, :], other=0.0)
    kind: tl.constexpr = q.dtype.element_ty
    k_table, v_table = tl.load(key_table + tl.arange(0, KEY_SIZE)), tl.load(value_table + tl.arange(0, VALUE_SIZE))
    most = tl.full((Q,), -1e30, dtype=tl.float32)
    total = tl.zeros((Q,), dtype=tl.float32)
    out = tl.zeros((Q, DV), dtype=tl.float32)
    for start in range(number * share, tl.minimum((number + 1) * share, tokens), T):
        at = start + tl.arange(0, T)
        here = at < tokens
        rows_at = head * tokens + at
        k = _decoded(keys, key_scales, key_zeros, k_table, rows_at, k_columns, here[:, None] & k_mask[None, :],
                     key_bytes, key_groups, key_group, KEY_BITS, KEY_SIZE, KEY_AFFINE, T, DK)  # fmt: skip
        scores = tl.dot(x, tl.trans(k.to(kind)), input_precision="ieee") * scaling
        seen = query_mask[:, None] & here[None, :]
        if MASKED:
            first = (head // kv_heads) * mask_batch + (head % kv_heads) * mask_head
            added = tl.load(mask + first + queries[:, None] * tokens + at[None, :], mask=seen, other=0.0)
            scores += added.to(tl.float32)
        scores = tl.where(seen & (scores > -1e29), scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        less = tl.exp(most - larger)
        v = _decoded(values, value_scales, value_zeros, v_table, rows_at, v_columns, here[:, None] & v_mask[None, :],
                     value_bytes, value_groups, value_group, VALUE_BITS, VALUE_SIZE, VALUE_AFFINE, T, DV)  # fmt: skip
        total = total * less + tl.sum(weights, 1)
        out = out * less[:, None] + tl.dot(weights.to(kind), v.to(kind), input_precision="ieee")
        most = larger
    own = (head * shares + number).to(tl.int64) * rows + queries
    tl.store(sums + 2 * own, most, mask=query_mask)
    tl.store(sums + 2 * own + 1, total, mask=query_mask)
    place = own[:, None] * value_width + v_columns[None, :]
    tl.store(parts + place, out, mask=query_mask[:, None] & v_mask[None, :])


def takes(scheme: ActivationScheme | None, width: int) -> bool:
    """Grids of one value a code with 4 to 256 points, a power of two."""
    if scheme is None or not isinstance(scheme.grid, Grid) or scheme.grid.p > 1 or width > 256:
        return False
    size = scheme.grid.size
    return 4 <= size <= 256 and packing.symbol(size) == (1, size.bit_length() - 1)


def attention(q: Tensor, keys: PackedSide, values: PackedSide, mask: Tensor | None, scaling: float) -> Tensor:
    """q [batch, heads, n, key width], keys and values [batch, kv_heads, tokens, width] -> [batch, heads, n, width].

    mask [1 or batch, 1 or heads, n, tokens]: true where attention looks, or added to scores; None: all is seen.
    """
    batch, heads, n, key_width = q.shape
    kv_heads, tokens = keys.codes.shape[1], keys.codes.shape[2]
    groups = heads // kv_heads
    rows, value_width = groups * n, values.width
    programs, share = batch * kv_heads, -(-min(tokens, _SHARE) // _TOKENS) * _TOKENS
    shares = -(-tokens // share)
    x = q.reshape(programs, rows, key_width).contiguous()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
        wanted = (mask.shape[0], heads, n, tokens)  # rows of a program are the queries of its heads, one after another
        mask = mask.float().expand(wanted).reshape(mask.shape[0], kv_heads, rows, tokens).contiguous()
    sums = torch.empty(programs, shares, rows, 2, device=q.device)
    parts = torch.empty(programs, shares, rows, value_width, device=q.device)
    for begin in range(0, rows, _MOST_ROWS):  # a long prompt: as many queries at a time as registers hold
        end = min(begin + _MOST_ROWS, rows)
        piece = (slice(None), slice(None), slice(begin, end))
        own = None if mask is None else mask[piece].contiguous()
        _run(x[:, begin:end].contiguous(), keys, values, own, scaling, kv_heads, sums, parts, piece, share)
    most = sums[..., 0].amax(1, keepdim=True)
    factors = (sums[..., 0] - most).exp()
    total = (factors * sums[..., 1]).sum(1)
    found = (factors[..., None] * parts).sum(1) / total[..., None]
    return found.view(batch, heads, n, value_width).to(q.dtype)


def _run(
    x: Tensor, keys: PackedSide, values: PackedSide, mask: Tensor | None, scaling: float, kv_heads: int, sums: Tensor,
    parts: Tensor, piece: tuple[slice, ...], share: int,
) -> None:  # fmt: skip
    """Fills the piece's sums and parts."""
    programs, rows, key_width = x.shape
    tokens, shares = keys.codes.shape[2], sums.shape[1]
    sides = [_side(keys), _side(values)]
    (k, kg), (v, vg) = ((side.scales.shape[-1], side.width // side.scales.shape[-1]) for side in (keys, values))
    own = torch.empty(programs, shares, rows, 2, device=x.device)
    out = torch.empty(programs, shares, rows, values.width, device=x.device)
    whole = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    kernel: Any = _attend
    kernel[programs, shares](
        x, *sides[0], *sides[1], x if mask is None else mask, own, out, rows, tokens, kv_heads, share, scaling,
        key_width, values.width, keys.codes.shape[-1], values.codes.shape[-1], k, v, kg, vg,
        whole, 0 if mask is None else mask.stride(1),
        KEY_BITS=_bits(keys), KEY_SIZE=keys.scheme.grid.size, KEY_AFFINE=keys.zeros is not None,
        VALUE_BITS=_bits(values), VALUE_SIZE=values.scheme.grid.size, VALUE_AFFINE=values.zeros is not None,
        MASKED=mask is not None, Q=max(16, triton.next_power_of_2(rows)), T=_TOKENS,
        DK=max(16, triton.next_power_of_2(key_width)), DV=max(16, triton.next_power_of_2(values.width)),
    )  # fmt: skip
    sums[piece], parts[piece] = own, out


def _bits(side: PackedSide) -> int:
    return side.scheme.grid.size.bit_length() - 1


def _side(side: PackedSide) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scales, zeros or something in their place, and the table of points, float32 [size]."""
    grid = side.scheme.grid
    assert isinstance(grid, Grid)
    table = grid.points[:, 0].to(side.codes.device, torch.float32).contiguous()
    codes, scales = side.codes.contiguous(), side.scales.contiguous()
    return codes, scales, scales if side.zeros is None else side.zeros.contiguous(), table
