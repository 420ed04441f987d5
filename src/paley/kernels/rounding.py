"""The native transform and rounding of activations, in one pass over each token.

`paley.core.transforms` and `paley.core.rounding` have their meaning: codes and values are equal to the bit.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paley.core import hadamard
from paley.core.errors import PaleyError
from paley.core.grids import FixedGrid, Grid
from paley.core.rounding import Quantized, check_groups
from paley.core.schemes import ActivationScheme
from paley.core.transforms import Transform, random_signs
from paley.kernels import columns, native

__all__ = ["quantize_dynamic", "round_trip", "rounding_of", "takes", "turn_back"]

_SHARE = 2**17  # least number of values for a thread: some 0.2 ms
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LANES = 8  # doubles of the widest vectors: rows of the dense matrix are padded to a multiple of it


class _Rounding(ctypes.Structure):
    """paley_rounding of csrc/paley.h."""

    _fields_ = [
        ("in_dim", ctypes.c_int32), ("out_dim", ctypes.c_int32), ("order", ctypes.c_int32), ("m", ctypes.c_int32),
        ("dense", ctypes.c_void_p), ("signs", ctypes.c_void_p), ("table", ctypes.c_void_p),
        ("back", ctypes.c_int32), ("group_size", ctypes.c_int32), ("affine", ctypes.c_int32),
        ("by_rms", ctypes.c_int32), ("half", ctypes.c_int32), ("refit", ctypes.c_int32), ("factor", ctypes.c_float),
        ("peak", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _How:
    """A transform, then a rounding of the values [out_dim] to groups."""

    raw: _Rounding
    kept: tuple[object, ...] = field(repr=False)  # what raw points to


def takes(x: Tensor, scheme: ActivationScheme | None) -> bool:
    """Whether the kernels round such values, as float32; they have no gradients."""
    return (
        x.dtype in _FLOATS
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.shape[-1] > 0
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and (scheme is None or _on_a_table(scheme.grid))
    )


def _on_a_table(grid: FixedGrid) -> bool:
    return isinstance(grid, Grid) and grid.p == 1


def round_trip(
    x: Tensor, scheme: ActivationScheme | None, scale_dtype: torch.dtype = torch.float32, *,
    transform: Transform | None = None, diagonal: Tensor | None = None,
    level: str | None = None, threads: int | None = None,
) -> Tensor:  # fmt: skip
    """x float32 [..., in] -> divided by `diagonal`, transformed, and rounded unless scheme is None, [..., out]."""
    how = rounding_of(x.shape[-1], scheme, transform, scale_dtype)
    values = torch.empty(*x.shape[:-1], how.raw.out_dim, device="cpu")
    _run(how, x, diagonal, level, threads, values=values)
    return values


def quantize_dynamic(
    x: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype = torch.float16, *,
    transform: Transform | None = None, diagonal: Tensor | None = None,
    level: str | None = None, threads: int | None = None,
) -> Quantized:  # fmt: skip
    """As `round_trip`, without the last step -> codes [..., out], scales and zeros [..., groups]."""
    how = rounding_of(x.shape[-1], scheme, transform, scale_dtype)
    width, rows = how.raw.out_dim, x.shape[:-1]
    if scheme.grid.size > 2**8:
        raise PaleyError(f"rounding: native kernels give codes of at most 8 bits, grid {scheme.grid.name!r} has more")
    codes = torch.empty(*rows, width, dtype=torch.uint8, device="cpu")
    scales = torch.empty(*rows, width // how.raw.group_size, device="cpu")
    zeros = torch.empty_like(scales, dtype=torch.uint8) if scheme.grid.affine else None
    _run(how, x, diagonal, level, threads, codes=codes, scales=scales, zeros=zeros)
    return Quantized(codes, scales.to(scale_dtype), zeros, scheme.grid, width)


def turn_back(x: Tensor, transform: Transform, *, level: str | None = None, threads: int | None = None) -> Tensor:
    """x float32 [..., out] -> Tᵀ x [..., in], as `Transform.adjoint`."""
    how = rounding_of(x.shape[-1], None, transform, torch.float32, back=True)
    values = torch.empty(*x.shape[:-1], how.raw.in_dim, device="cpu")
    _run(how, x, None, level, threads, values=values)
    return values


def _run(
    how: _How, x: Tensor, diagonal: Tensor | None, level: str | None, threads: int | None, **results: Tensor | None
) -> None:
    width = how.raw.out_dim if how.raw.back else how.raw.in_dim
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1] != width:
        raise PaleyError(
            f"rounding: native kernels read float32 [..., {width}] on the CPU, got {x.dtype} {list(x.shape)} on "
            f"{x.device}; convert it"
        )
    if diagonal is not None:
        if diagonal.shape != (width,) or diagonal.device.type != "cpu":
            raise PaleyError(
                f"rounding: the diagonal must be [{width}] on the CPU, got {list(diagonal.shape)} on {diagonal.device}"
            )
        diagonal = diagonal.detach().float().contiguous()
    x = x.detach().contiguous()
    tokens = x.numel() // width
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), tokens * how.raw.out_dim // _SHARE))
    pointers = (results.get(name) for name in ("values", "codes", "scales", "zeros"))
    native.call(
        native.load().paley_round,
        ctypes.byref(how.raw), x.data_ptr(), tokens, None if diagonal is None else diagonal.data_ptr(),
        native.level_number("rounding", level, native.best_level()), threads,
        *(None if result is None else result.data_ptr() for result in pointers),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def rounding_of(
    width: int,
    scheme: ActivationScheme | None,
    transform: Transform | None,
    scale_dtype: torch.dtype,
    back: bool = False,
) -> _How:
    """Shared by all calls that round so."""
    with torch.inference_mode(False), torch.device("cpu"):
        raw, kept = _Rounding(width, width, 1, 1, back=back), []
        if transform is not None:
            kept += _turn(raw, transform, width)
        if scheme is not None:
            kept += _round(raw, scheme, scale_dtype)
    return _How(raw, tuple(kept))


def _turn(raw: _Rounding, transform: Transform, width: int) -> list[object]:
    name = "out_dim" if raw.back else "in_dim"
    if width != getattr(transform, name):
        raise PaleyError(f"transform: last dimension is {width}, expected {name}={getattr(transform, name)}")
    raw.in_dim, raw.out_dim, raw.order = transform.in_dim, transform.out_dim, transform.order
    raw.m, steps = hadamard.factor(transform.order)
    while raw.m < _LANES and steps:  # a small matrix takes Sylvester steps until it fills vectors
        raw.m, steps = 2 * raw.m, steps - 1
    dense = hadamard.hadamard(raw.m).double()
    dense = dense if raw.back else dense.T
    dense = torch.nn.functional.pad(dense, (0, -raw.m % _LANES)).contiguous()
    raw.dense = dense.data_ptr()
    if transform.seed is None:
        return [dense]
    signs = random_signs(transform.out_dim, transform.seed).float()
    raw.signs = signs.data_ptr()
    return [dense, signs]


def _round(raw: _Rounding, scheme: ActivationScheme, scale_dtype: torch.dtype) -> list[object]:
    if scale_dtype not in (torch.float32, torch.float16):
        raise PaleyError(f"rounding: native kernels store scales in float32 or float16, not {scale_dtype}")
    grid = scheme.grid
    assert isinstance(grid, Grid)
    check_groups(raw.out_dim, scheme.group_size, "rounding")
    table = columns.table_of(grid)
    raw.table, raw.group_size = ctypes.addressof(table.raw), scheme.group_size or raw.out_dim
    raw.affine, raw.by_rms = grid.affine, scheme.scale == "rms" and not grid.affine
    raw.half, raw.refit, raw.peak = scale_dtype == torch.float16, scheme.refit, grid.peak
    if grid.affine:
        raw.factor = scheme.clip_ratio
    else:
        raw.factor = scheme.clip_ratio * grid.gaussian_scale if raw.by_rms else scheme.clip_ratio / grid.peak
    return [table]
