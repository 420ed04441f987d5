"""The shared library of csrc/, by ctypes: found, checked, called. Its calls release the GIL."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core import nearest
from paley.core.errors import PaleyError

__all__ = ["ABI_VERSION", "LEVELS", "best_level", "load", "nearest_points", "why_missing"]

ABI_VERSION = 1  # PALEY_ABI_VERSION in csrc/paley.h
LEVELS = ("portable", "avx2", "avx512")  # paley_level there
_STATUS = ("ok", "bad argument", "out of memory", "internal error")
_SHARE = 2**18  # scores that a thread should have to itself at least: starting one takes some 30 microseconds

LIBRARY = Path(__file__).with_name("libpaley" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_BUILD = "install a C++ compiler and run `make setup` (or `pip install -e .`) again"

_SIGNATURES: dict[str, list[Any]] = {
    "paley_best_level": [],
    "paley_nearest_points": [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32,
        ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p,
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
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error}): {_BUILD}"
    return library


def load() -> ctypes.CDLL:
    """The library; PaleyError says why there is none."""
    library = _open(LIBRARY)
    if isinstance(library, str):
        raise PaleyError(f"native kernels: {library}")
    return library


def why_missing() -> str | None:
    """Why `load` would fail, or None."""
    library = _open(LIBRARY)
    return library if isinstance(library, str) else None


def best_level() -> str:
    """The best of LEVELS that this machine has."""
    return LEVELS[load().paley_best_level()]


def nearest_points(x: Tensor, points: Tensor, *, level: str | None = None, threads: int | None = None) -> Tensor:
    """`core.nearest.reference` for CPU tensors, the same codes; level: of LEVELS, the best by default.

    threads: torch's number by default, fewer where there is little to do.
    """
    library = load()
    nearest.check(x, points)
    shape = x.shape[:-1]
    x, points = nearest.prepare(x, points)
    codes = torch.empty(len(x), dtype=torch.int32)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), len(x) * len(points) // _SHARE))
    _call(
        library.paley_nearest_points,
        x.data_ptr(), len(x), points.data_ptr(), *points.shape,
        LEVELS.index(level or best_level()), threads, codes.data_ptr(),
    )  # fmt: skip
    return codes.view(shape)


def _call(function: Callable[..., int], *arguments: int) -> None:
    status = function(*arguments)
    if status:
        raise PaleyError(f"native kernels: {function.__name__} failed: {_STATUS[status]}")
