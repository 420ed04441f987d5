"""Packing of codes: a dense little-endian bit stream per row.

A code below n takes log2(n) bits if that is a whole number. Otherwise k codes are stored as one number in base n, with
the k up to 8 that wastes least: two codes below 88 take 13 bits, five below 3 take 8 (`symbol`).

Symbol i of b bits occupies bits i·b to i·b + b - 1 of its row, least significant first. The last byte of a ragged
row is filled with zeros. Up to 8 bits, eight symbols share one int64 word. Its fields are spread or gathered in three
halving steps, as `pdep` and `pext` do. This is six times faster than shifting each code out of the word.
"""

from __future__ import annotations

import functools
import math
import sys

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid

__all__ = ["pack", "pack_codes", "packed_bytes", "packed_width", "stored_bits", "symbol", "unpack", "unpack_codes"]

# Words at a time: they fit a CPU's second-level cache. Measured best for 2 to 7 bits.
_CPU_WORDS = 2**15
_AT_ONCE = 2**20  # codes of a matrix, some of which take eight bytes each on their way
_WIDEST = 48  # bits of a symbol: with the 7 before it in its first byte it still fits an int64


@functools.cache
def symbol(size: int) -> tuple[int, int]:
    """Codes below `size` -> (k, b): k of them are stored as one number of b bits."""
    if not 2 <= size <= 2**_WIDEST:
        raise PaleyError(f"packing: codes must have 2 to 2**{_WIDEST} values, got {size}")
    widths = [(k, (size**k - 1).bit_length()) for k in range(1, 9)]
    return min((w for w in widths if w[0] == 1 or w[1] <= _WIDEST), key=lambda w: (w[1] / w[0], w[0]))


def stored_bits(grid: AnyGrid) -> float:
    """Stored bits for each of the p values of a code, without scales; log2(size) / p at best."""
    k, bits = symbol(grid.size)
    return bits / k / grid.p


def packed_bytes(n: int, size: int) -> int:
    """Bytes of one packed row of n codes below `size`."""
    k, bits = symbol(size)
    return packed_width(-(-n // k), bits)


def pack_codes(codes: Tensor, size: int) -> Tensor:
    """codes, integers [..., n] below `size` -> uint8 [..., packed_bytes(n, size)]; PaleyError on larger ones."""
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= size:
        raise PaleyError(f"pack: codes must be between 0 and {size - 1}, got {low} to {high}")
    if codes.dim() == 2 and codes.numel() > _AT_ONCE:
        few, width = max(1, _AT_ONCE // codes.shape[1]), packed_bytes(codes.shape[1], size)
        packed = torch.empty(len(codes), width, dtype=torch.uint8, device=codes.device)
        for rows, out in zip(codes.split(few), packed.split(few), strict=True):
            out.copy_(_packed(rows, size))
        return packed
    return _packed(codes, size)


def _packed(codes: Tensor, size: int) -> Tensor:
    k, bits = symbol(size)
    if k == 1:
        return pack(codes.to(torch.uint8), bits) if bits <= 8 else _pack_wide(codes.long(), bits)
    symbols = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % k)).unflatten(-1, (-1, k))
    powers = torch.tensor([size**i for i in range(k)], device=codes.device)
    symbols = (symbols * powers).sum(-1)
    return pack(symbols.to(torch.uint8), bits) if bits <= 8 else _pack_wide(symbols, bits)


def unpack_codes(packed: Tensor, size: int, n: int) -> Tensor:
    """packed uint8 [..., packed_bytes(n, size)] -> codes [..., n] below `size`: uint8 up to 256, else int64.

    Errors: PaleyError for symbols that no codes can give.
    """
    if packed.dim() == 2 and len(packed) * n > _AT_ONCE:
        parts = packed.split(max(1, _AT_ONCE // n))
        return torch.cat([_unpacked(rows, size, n) for rows in parts])
    return _unpacked(packed, size, n)


def _unpacked(packed: Tensor, size: int, n: int) -> Tensor:
    k, bits = symbol(size)
    count = -(-n // k)
    symbols = unpack(packed, bits, count) if bits <= 8 else _unpack_wide(packed, bits, count)
    if size**k < 1 << bits and symbols.numel() and (largest := int(symbols.max())) >= size**k:
        raise PaleyError(f"unpack: {largest} is not {k} codes below {size}; the file is damaged")
    if k == 1:
        return symbols
    powers = torch.tensor([size**i for i in range(k)], device=packed.device)
    codes = (symbols.long()[..., None] // powers % size).flatten(-2)[..., :n]
    return codes.to(torch.uint8) if size <= 2**8 else codes


def _pack_wide(symbols: Tensor, bits: int) -> Tensor:
    """As `pack`, for int64 symbols of 9 to 48 bits: a byte holds parts of two of them at most."""
    n = symbols.shape[-1]
    rows = torch.nn.functional.pad(symbols, (0, -n % 8)).reshape(-1, 8)
    out = torch.empty(len(rows), bits, dtype=torch.uint8, device=symbols.device)
    for byte in range(bits):
        i, shift = divmod(8 * byte, bits)
        value = rows[:, i] >> shift
        if shift + 8 > bits and i < 7:
            value |= rows[:, i + 1] << (bits - shift)
        out[:, byte] = value & 255
    return out.view(*symbols.shape[:-1], -(-n // 8) * bits)[..., : packed_width(n, bits)].contiguous()


def _unpack_wide(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undoes `_pack_wide` -> int64 [..., n]."""
    _check_packed(packed, bits, n)
    count = 8 // math.gcd(bits, 8)  # symbols that fill whole bytes: of 12 bits two, in three bytes
    groups, width = -(-n // count), count * bits // 8
    rows = torch.nn.functional.pad(packed, (0, groups * width - packed.shape[-1])).reshape(-1, width)
    out = torch.empty(len(rows), count, dtype=torch.int64, device=packed.device)
    kind = torch.int32 if bits <= 16 else torch.int64  # a symbol and its shift: at most three bytes
    for i in range(count):
        first, shift = divmod(i * bits, 8)
        value = rows[:, first].to(kind)
        for byte in range(1, (shift + bits + 7) // 8):
            value |= rows[:, first + byte].to(kind) << (8 * byte)
        out[:, i] = value.bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)
    return out.view(*packed.shape[:-1], groups * count)[..., :n].contiguous()


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
    _check_packed(packed, bits, n)
    width = packed_width(n, bits)
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
    """rows [m, ...] -> slices of its first dimension that fit a CPU's cache; a single slice on other devices."""
    step = _CPU_WORDS if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _spread_(words: Tensor, bits: int) -> Tensor:
    """int64: 8 codes in the low 8·bits bits -> one code in each byte, in place."""
    for count in (4, 2, 1):  # codes in the upper half of each field, which moves up by `shift`
        shift = count * (8 - bits)
        upper = words & _mask(16 * count, count * bits, 2 * count * bits)
        words += upper.mul_((1 << shift) - 1)  # clears the upper half and adds it at its place
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


def _check_packed(packed: Tensor, bits: int, n: int) -> None:
    width = packed_width(n, bits)
    if packed.dtype != torch.uint8 or n < 0 or packed.shape[-1] != width:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise PaleyError(f"unpack: {n} codes of {bits} bits take {width} bytes a row, got {got}")


def _check(where: str, what: str, x: Tensor, bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise PaleyError(f"{where}: bits must be an integer between 1 and 8, got {bits!r}")
    if x.dtype != torch.uint8:
        raise PaleyError(f"{where}: {what} must be uint8, got {x.dtype}")
    if x.dim() == 0:
        raise PaleyError(f"{where}: {what} must have at least one dimension, got a scalar")
    if sys.byteorder != "little":  # words are read as bytes
        raise PaleyError(f"{where}: this machine is big-endian; packing supports little-endian machines only")
