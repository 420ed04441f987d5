"""ggml's K-quants: superblocks of 256 values whose groups have scales of 6 or 8 bits. Weights are rounded anew to them.

Q4_K: eight groups of 32 codes of 4 bits, a value is d · s · c - e · m with s and m of 6 bits. Q6_K: sixteen groups of
16 codes of 6 bits, a value is d · s · (c - 32) with s of 8 bits. d and e are float16. All are chosen by least squares:
scales for given codes and codes for given scales, in turns, then the same again for d and e with the small scales as
they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUPERBLOCK", "fit_q4_k", "fit_q6_k"]

SUPERBLOCK = 256
_ROUNDS = 6
_TINY = 1e-30


def fit_q4_k(weight: Tensor) -> Tensor:
    """weight float32 [rows, columns], 256 dividing columns -> uint8 [rows, columns / 256 · 144]."""
    x = weight.reshape(len(weight), -1, 8, 32).double()
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    best = torch.full_like(low, torch.inf)
    scales, mins = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in (1.0, 0.92, 0.84):
        scale, least = shrink * (high - low) / 15, -shrink * low
        for _ in range(_ROUNDS):
            codes = _codes(x, scale[..., None], least[..., None], 15)
            error = (scale[..., None] * codes - least[..., None] - x).square().sum(-1)
            better = error < best
            best, scales, mins = (torch.where(better, *p) for p in ((error, best), (scale, scales), (least, mins)))
            scale, least = _line(x, codes)
    d, e = (_largest(part.amax(-1, keepdim=True) / 63) for part in (scales, mins))
    s, m = (_rounded(part, big, 63) for part, big in ((scales, d), (mins, e)))
    codes = _codes(x, (d * s)[..., None], (e * m)[..., None], 15)
    for _ in range(_ROUNDS):
        d_new, e_new = _big_scales(x, s[..., None] * codes, m[..., None].expand_as(x))
        codes_new = _codes(x, (d_new * s)[..., None], (e_new * m)[..., None], 15)
        before, after = (
            ((a * s)[..., None] * c - (b * m)[..., None] - x).square().sum((-1, -2), keepdim=True)[..., 0]
            for a, b, c in ((d, e, codes), (d_new, e_new, codes_new))
        )
        better = after < before
        d, e = torch.where(better, d_new, d), torch.where(better, e_new, e)
        codes = torch.where(better[..., None], codes_new, codes)
    c = codes.to(torch.uint8).unflatten(2, (4, 2))  # two groups share 32 bytes: the first has the low halves
    nibbles = c[..., 0, :] | c[..., 1, :] << 4
    return torch.cat([_bytes(d), _bytes(e), _six_bits(s, m), nibbles.flatten(2)], -1).flatten(1)


def fit_q6_k(weight: Tensor) -> Tensor:
    """weight float32 [rows, columns], 256 dividing columns -> uint8 [rows, columns / 256 · 210]."""
    x = weight.reshape(len(weight), -1, 16, 16).double()
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]  # of the sign that -32 reaches
    best, scales = torch.full_like(peak, torch.inf), torch.zeros_like(peak)
    for reach in (-32.0, -30.0, 31.0):
        scale = peak / reach
        for _ in range(_ROUNDS):
            codes = _signed(x, scale[..., None])
            error = (scale[..., None] * codes - x).square().sum(-1)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
            scale = (x * codes).sum(-1) / codes.square().sum(-1).clamp(min=_TINY)
    largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    d = _largest(largest / -128)
    s = torch.where(d == 0, torch.zeros_like(scales), (scales / _safe(d)).round().clamp(-128, 127))
    codes = _signed(x, (d * s)[..., None])
    for _ in range(_ROUNDS):
        steps = s[..., None] * codes
        total = steps.square().sum((-1, -2)).clamp(min=_TINY)
        d_new = _half(((x * steps).sum((-1, -2)) / total)[..., None])
        codes_new = _signed(x, (d_new * s)[..., None])
        before, after = (
            ((a * s)[..., None] * c - x).square().sum((-1, -2))[..., None] for a, c in ((d, codes), (d_new, codes_new))
        )
        d = torch.where(after < before, d_new, d)
        codes = torch.where((after < before)[..., None], codes_new, codes)
    c = (codes + 32).to(torch.uint8).reshape(*codes.shape[:2], 2, 4, 32)  # halves of 128, four runs of 32 in each
    low = (c[..., 0:2, :] & 15 | (c[..., 2:4, :] & 15) << 4).flatten(2)
    high = c[..., 0, :] >> 4 | c[..., 1, :] >> 4 << 2 | c[..., 2, :] >> 4 << 4 | c[..., 3, :] >> 4 << 6
    return torch.cat([low, high.flatten(2), s.to(torch.int8).view(torch.uint8), _bytes(d)], -1).flatten(1)


def _largest(scale: Tensor) -> Tensor:
    """A superblock's scale in float16, at least the smallest number of it unless it is 0."""
    return torch.where(scale == 0, scale, _half(scale.sign() * scale.abs().clamp(min=2.0**-24)))


def _codes(x: Tensor, scale: Tensor, least: Tensor, most: int) -> Tensor:
    return torch.where(scale > 0, ((x + least) / _safe(scale)).round().clamp(0, most), torch.zeros_like(x))


def _signed(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale != 0, (x / _safe(scale)).round().clamp(-32, 31), torch.zeros_like(x))


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _line(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """-> (scale, least) of the best line x = scale · code - least in each group, neither of them negative."""
    count = x.shape[-1]
    sum_c, sum_x = codes.sum(-1), x.sum(-1)
    spread = count * codes.square().sum(-1) - sum_c.square()
    scale = (count * (codes * x).sum(-1) - sum_c * sum_x) / spread.clamp(min=_TINY)
    least = (scale * sum_c - sum_x) / count
    through = (codes * x).sum(-1) / codes.square().sum(-1).clamp(min=_TINY)
    return torch.where(least < 0, through, scale).clamp(min=0), least.clamp(min=0)


def _big_scales(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """-> d, e [rows, superblocks, 1] of the least error of d · a - e · b; float16 values, e not negative."""
    aa, ab, bb = (p.sum((-1, -2)) for p in (a * a, a * b, b * b))
    ax, bx = (a * x).sum((-1, -2)), (b * x).sum((-1, -2))
    determinant = aa * bb - ab * ab
    whole = determinant > 1e-9 * aa * bb
    d = torch.where(whole, (ax * bb - bx * ab) / _safe(determinant), ax / aa.clamp(min=_TINY))
    e = torch.where(whole, (ax * ab - bx * aa) / _safe(determinant), torch.zeros_like(ax))
    d = torch.where(e < 0, ax / aa.clamp(min=_TINY), d)
    return _half(d.clamp(min=0))[..., None], _half(e.clamp(min=0))[..., None]


def _rounded(part: Tensor, big: Tensor, most: int) -> Tensor:
    return torch.where(big > 0, (part / _safe(big)).round().clamp(0, most), torch.zeros_like(part))


def _half(x: Tensor) -> Tensor:
    """The nearest float16 values, finite ones, in float64."""
    return x.clamp(-65504, 65504).half().double()


def _bytes(x: Tensor) -> Tensor:
    """x [rows, superblocks, 1] -> its float16 bytes [rows, superblocks, 2]."""
    return x.half().contiguous().view(torch.uint8)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    """s, m [..., 8] below 64 -> [..., 12]: the first four in six bits, on top the other two bits of the last."""
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    first = [part[..., :4] | part[..., 4:] >> 4 << 6 for part in (s, m)]
    return torch.cat([*first, s[..., 4:] & 15 | (m[..., 4:] & 15) << 4], -1)
