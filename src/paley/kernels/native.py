"""The shared library of csrc/: finds, checks and calls it through ctypes. Calls release the GIL."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core import nearest, planes
from paley.core.errors import PaleyError, nearest_name

__all__ = [
    "ABI_VERSION",
    "LEVELS",
    "PATHS",
    "best_level",
    "best_planes_level",
    "blob_bytes",
    "call",
    "check",
    "fits",
    "level_number",
    "load",
    "nearest_points",
    "pack_planes",
    "planes_matmul",
    "why_missing",
]

ABI_VERSION = 16  # PALEY_ABI_VERSION in csrc/paley.h
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # paley_level there
PATHS = ("auto", "popcount", "dots", "tables")  # paley_path there
_STATUS = ("ok", "bad argument", "out of memory", "internal error")
_SHARE = 2**18  # least number of scores for a thread: starting one takes some 30 microseconds
_PLANES_SHARE = 2**27  # likewise of products, some 1 ms: for less, torch's spinning threads are in the way

LIBRARY = Path(__file__).with_name("libpaley" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_BUILD = "install a C++ compiler and run `make setup` (or `pip install -e .`) again"

_SIGNATURES: dict[str, list[Any]] = {
    "paley_borrow_threads": [ctypes.c_void_p],
    "paley_best_level": [],
    "paley_best_planes_level": [],
    "paley_best_products_level": [],
    "paley_nearest_points": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p,
    ],
    "paley_cells": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "paley_search_scales": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p,
    ],
    "paley_feedback": [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_void_p, ctypes.c_void_p,
    ],
    "paley_descent": [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "paley_follow": [
        ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_void_p,
    ],
    "paley_trellis_codes": [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "paley_trellis_values": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
    ],
    "paley_products": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_void_p,
    ],
    "paley_best_matmul_level": [],
    "paley_matmul_levels": [],
    "paley_matrix_bytes": [ctypes.c_void_p, ctypes.c_void_p],
    "paley_pack_matrix": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "paley_pack_stored_matrix": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p,
    ],
    "paley_inputs_bytes": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
    "paley_encode_inputs": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32,
        ctypes.c_int64, ctypes.c_void_p,
    ],
    "paley_matmul": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_void_p,
    ],
    "paley_round": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "paley_pack_planes": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64,
        ctypes.c_void_p,
    ],
    "paley_planes_matmul": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_void_p,
    ],
}  # fmt: skip


@functools.cache
def _open(path: Path) -> ctypes.CDLL | str:
    """The library at `path`, or why there is none."""
    if not path.is_file():
        return f"{path.name} was not built: {_BUILD}"
    try:
        library = ctypes.CDLL(str(path))
        version = library.paley_abi_version()
        if version != ABI_VERSION:
            return f"{path} is of another version of Paley (ABI {version}, needed {ABI_VERSION}): {_BUILD}"
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int32
        if os.environ.get("PALEY_THREADS") != "own" and (parallel := _gomp_parallel()) is not None:
            library.paley_borrow_threads(parallel)
            os.register_at_fork(
                after_in_child=lambda: library.paley_borrow_threads(None)
            )  # a child has no such threads
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error}): {_BUILD}"
    return library


def _gomp_parallel() -> int | None:
    """Where GOMP_parallel is in the libgomp that PyTorch computes with; None if PyTorch has other threads."""
    for name in (*map(str, Path(torch.__file__).parent.glob("lib/libgomp*.so*")), "libgomp.so.1"):
        try:
            gomp = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(gomp.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):  # not loaded, or no Linux
            continue
    return None


def load() -> ctypes.CDLL:
    """The library, or a PaleyError with the reason why there is none."""
    library = _open(LIBRARY)
    if isinstance(library, str):
        raise PaleyError(f"native kernels: {library}")
    return library


def why_missing() -> str | None:
    """The reason why `load` fails, or None."""
    library = _open(LIBRARY)
    return library if isinstance(library, str) else None


def best_level() -> str:
    """The best of LEVELS on this machine for `nearest_points`."""
    return LEVELS[load().paley_best_level()]


def best_planes_level() -> str:
    """Likewise for `planes_matmul`, which needs more instructions of each level: see csrc/paley.h."""
    return LEVELS[load().paley_best_planes_level()]


def nearest_points(x: Tensor, points: Tensor, *, level: str | None = None, threads: int | None = None) -> Tensor:
    """`core.nearest.reference` for CPU tensors, the same codes; level: of LEVELS, the best by default.

    threads: torch's number by default, fewer if there is little to do.
    """
    library = load()
    nearest.check(x, points)
    shape = x.shape[:-1]
    number = level_number("nearest_points", level, best_level())
    x, points = nearest.prepare(x, points)
    codes = torch.empty(len(x), dtype=torch.int32)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), len(x) * len(points) // _SHARE))
    call(
        library.paley_nearest_points,
        x.data_ptr(), len(x), points.data_ptr(), *points.shape,
        number, threads, codes.data_ptr(),
    )  # fmt: skip
    return codes.view(shape)


def fits(group_size: int) -> bool:
    """Whether the planes kernels take groups of this size: whole words of 32, and sums that stay exact."""
    return group_size % 32 == 0 and 32 <= group_size <= 512


def blob_bytes(out: int, groups: int, group_size: int) -> int:
    """Bytes that `pack_planes` makes: a header, then a record for each 16 rows and group; layout: csrc/planes.h."""
    return 64 + -(-out // 16) * groups * (4 * group_size + 128)


def pack_planes(codes: Tensor, centroids: Tensor) -> Tensor:
    """codes [out, n], centroids [out, groups, 4] as in `core.planes` -> uint8 [bytes], what `planes_matmul` reads.

    It is no larger than codes and centroids: 2 + 64 / group_size bits a weight, rows rounded up to 16. All levels read
    this layout.
    """
    library = load()
    planes.check_weight(codes, centroids)
    out, groups, _ = centroids.shape
    group_size = codes.shape[1] // groups
    if not fits(group_size):
        raise PaleyError(
            f"pack_planes: group_size={group_size} is no multiple of 32 up to 512; quantize in groups that are, "
            "or take the reference (PALEY_BACKEND=auto does)"
        )
    _check_cpu("pack_planes", codes)
    codes, centroids = codes.contiguous(), centroids.contiguous()
    blob = torch.empty(blob_bytes(out, groups, group_size), dtype=torch.uint8)
    call(
        library.paley_pack_planes,
        codes.data_ptr(), centroids.data_ptr(), out, groups, group_size, len(blob), blob.data_ptr(),
    )  # fmt: skip
    return blob


def planes_matmul(
    x_codes: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor,
    blob: Tensor,
    out: int,
    *,
    path: str = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """`core.planes.reference` for a blob of `pack_planes`, on the CPU -> float32 [tokens, out].

    path: of PATHS; level: of LEVELS, the best by default; threads: torch's number by default, fewer if there is
    little to do. The result is the same, to the bit, for all of them.
    """
    library = load()
    if path not in PATHS:
        raise PaleyError(f"planes_matmul: path {path!r} is none of {', '.join(PATHS)}{nearest_name(path, PATHS)}")
    planes.check_inputs(x_codes, x_scales, x_zeros)
    _check_cpu("planes_matmul", x_codes, blob)
    number = level_number("planes_matmul", level, best_planes_level())
    tokens, n = x_codes.shape
    groups = x_scales.shape[1]
    if blob.dtype != torch.uint8 or blob.dim() != 1 or len(blob) != blob_bytes(out, groups, n // groups):
        raise PaleyError(
            f"planes_matmul: a blob of {blob.dtype} {list(blob.shape)} is not of {out} rows, {groups} groups and {n} "
            "columns; the inputs must have the weight's shape"
        )
    x_codes, x_scales, x_zeros, blob = (x.contiguous() for x in (x_codes, x_scales, x_zeros, blob))
    y = torch.empty(tokens, out)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), tokens * out * n // _PLANES_SHARE))
    call(
        library.paley_planes_matmul,
        x_codes.data_ptr(), x_scales.data_ptr(), x_zeros.data_ptr(), tokens, blob.data_ptr(), len(blob),
        out, groups, n // groups, PATHS.index(path), number, threads, y.data_ptr(),
    )  # fmt: skip
    return y


def level_number(what: str, level: str | None, best: str) -> int:
    """The number of `level`, or of the best one if none is given. A level that is given is used or refused."""
    level = best if level is None else level
    if level not in LEVELS:
        raise PaleyError(f"{what}: level {level!r} is none of {', '.join(LEVELS)}{nearest_name(level, LEVELS)}")
    if LEVELS.index(level) > LEVELS.index(best):
        raise PaleyError(f"{what}: this machine lacks instructions of level {level!r}; its best is {best!r}")
    return LEVELS.index(level)


def _check_cpu(what: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise PaleyError(f"{what}: native kernels run on the CPU, got a tensor on {tensor.device}; move it")


def call(function: Callable[..., int], *arguments: Any) -> None:
    check(function, function(*arguments))


def check(function: Callable[..., int], status: int) -> None:
    """Raises for a status of `function` that is not ok."""
    if status:
        raise PaleyError(f"native kernels: {function.__name__} failed: {_STATUS[status]}")
