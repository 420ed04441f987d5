"""Packing of b-bit codes: a dense little-endian bit stream per row, 8 codes to b bytes.

Code i occupies bits i·b to i·b + b - 1 of its row, least significant first. The last byte of a ragged row is
filled with zeros. Eight codes travel in one int64 word: fields are spread or gathered in three halving steps,
as `pdep` and `pext` would do, six times faster than shifting every code out of the word by itself.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["pack", "packed_width", "unpack"]

# Words at a time, so that a CPU's second-level cache holds them; measured best for 2 to 7 bits.
_CPU_WORDS = 2**15


def packed_width(n: int, bits: int) -> int:
    """Bytes of one packed row of n codes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., n], each below 2**bits -> uint8 [..., ceil(n·bits/8)]; PaleyError on larger codes."""
    _check("pack", "codes", codes, bits)
    if codes.numel() and (largest := int(codes.max())) >> bits:
        raise PaleyError(f"pack: code {largest} does not fit in {bits} bits; codes must be below {2**bits}")
    n = codes.shape[-1]
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], packed_width(n, bits))
    groups = -(-n // 8)
    padded = codes.new_zeros(*codes.shape[:-1], groups * 8)
    padded[..., :n] = codes
    rows = padded.view(-1, 8)
    words = rows.view(torch.int64)
    out = rows.new_empty(len(rows), bits)
    for some in _slices(rows):
        _gather_(words[some], bits)
        out[some] = rows[some, :bits]
    return out.view(*codes.shape[:-1], groups * bits)[..., : packed_width(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """packed uint8 [..., ceil(n·bits/8)] -> codes uint8 [..., n]; the bits after the last are ignored."""
    _check("unpack", "packed codes", packed, bits)
    width = packed_width(n, bits)
    if n < 0 or packed.shape[-1] != width:
        raise PaleyError(f"unpack: {n} codes of {bits} bits take {width} bytes a row, got shape {tuple(packed.shape)}")
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], n)
    groups = -(-n // 8)
    if groups * bits > width:
        packed = torch.nn.functional.pad(packed, (0, groups * bits - width))
    rows = packed.reshape(-1, bits)
    out = rows.new_zeros(len(rows), 8)
    words = out.view(torch.int64)
    for some in _slices(rows):
        out[some, :bits] = rows[some]
        _spread_(words[some], bits)
    return out.view(*packed.shape[:-1], groups * 8)[..., :n].contiguous()


def _slices(rows: Tensor) -> list[slice]:
    """rows [m, ...] -> slices of its first dimension; one for all where there is no cache to care for."""
    step = _CPU_WORDS if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _spread_(words: Tensor, bits: int) -> Tensor:
    """int64: 8 codes in the low 8·bits bits -> one code in each byte, in place."""
    for count in (4, 2, 1):  # codes in the upper half of each field, which moves up by `shift`
        shift = count * (8 - bits)
        upper = words & _mask(16 * count, count * bits, 2 * count * bits)
        words += upper.mul_((1 << shift) - 1)  # clears the upper half and adds it where it belongs
    return words


def _gather_(words: Tensor, bits: int) -> Tensor:
    """int64: undoes `_spread_`, in place."""
    for count in (1, 2, 4):
        shift = count * (8 - bits)
        upper = words & _mask(16 * count, 8 * count, 8 * count + count * bits)
        words ^= upper
        words |= upper.bitwise_right_shift_(shift)
    return words


def _mask(width: int, low: int, high: int) -> int:
    """The bits low to high - 1 of every field of `width` bits in a word; below 2**63, as bits < 8."""
    return sum(((1 << high) - (1 << low)) << start for start in range(0, 64, width))


def _check(where: str, what: str, x: Tensor, bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise PaleyError(f"{where}: bits must be an integer between 1 and 8, got {bits!r}")
    if x.dtype != torch.uint8:
        raise PaleyError(f"{where}: {what} must be uint8, got {x.dtype}")
    if x.dim() == 0:
        raise PaleyError(f"{where}: {what} must have at least one dimension, got a scalar")
    if sys.byteorder != "little":  # words are read as bytes
        raise PaleyError(f"{where}: this machine is big-endian; packing supports little-endian machines only")
