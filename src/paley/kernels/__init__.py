"""Native kernels for the ops that core/ declares. The torch reference in core/ defines what each of them computes.

PALEY_BACKEND selects `auto` (native if the library was built, else the reference), `native`, or `reference`.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from paley.core import nearest, planes, viterbi
from paley.core.errors import PaleyError, nearest_name
from paley.kernels import native, products, trellis_codes

__all__ = ["BACKENDS", "available", "backend", "multiplies_bfloat16", "planes_fit", "register"]

BACKENDS = ("auto", "native", "reference")
_LOG = logging.getLogger(__name__)


def available() -> bool:
    """Whether the native kernels were built and can be loaded here."""
    return native.why_missing() is None


def backend(name: str | None = None) -> str:
    """The backend that `name` (by default $PALEY_BACKEND, else "auto") selects here: "native" or "reference".

    Errors: PaleyError if native kernels are asked for by name and missing, or the name is unknown.
    """
    return _resolve(name or _asked())


def _asked() -> str:
    return os.environ.get("PALEY_BACKEND") or "auto"


@functools.cache
def _resolve(name: str) -> str:
    if name not in BACKENDS:
        raise PaleyError(f"backend {name!r} is none of {', '.join(BACKENDS)}{nearest_name(name, BACKENDS)}")
    if name == "reference":
        return name
    if name == "native":
        native.load()
        return name
    reason = native.why_missing()
    if reason is None:
        _LOG.info("native kernels, %s, for planes %s", native.best_level(), native.best_planes_level())
        return "native"
    _LOG.warning("no native kernels, the slower torch reference runs instead: %s", reason)
    return "reference"


def planes_fit(group_size: int) -> bool:
    """Whether native kernels multiply planes in groups of this many columns. If not, logs one warning.

    Errors: PaleyError if PALEY_BACKEND=native and they do not.
    """
    if backend() != "native":
        return False
    if native.fits(group_size):
        return True
    if _asked() == "native":
        raise PaleyError(
            f"PALEY_BACKEND=native: the plane kernels take no groups of {group_size} columns, only multiples of 32 up "
            "to 512; quantize in such groups, or set PALEY_BACKEND=auto for the torch reference"
        )
    _say_misfit(int(group_size))
    return False


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether there are instructions for it, so that `products` is faster than float32."""
    return device.type == "cpu" and backend() == "native" and products.best_level() in products.BFLOAT16


@functools.cache
def register() -> torch.library.Library:
    """Registers the kernels for core's ops on the CPU, once. The backend is chosen when an op first runs."""
    library = torch.library.Library("paley", "FRAGMENT")
    library.impl("nearest_points", _nearest_points, "CPU")
    library.impl("planes_pack", _planes_pack, "CPU")
    library.impl("planes_matmul", _planes_matmul, "CPU")
    library.impl("trellis_codes", _trellis_codes, "CPU")
    library.impl("trellis_values", _trellis_values, "CPU")
    # Not in core: the size of a packed weight depends on the kernels.
    torch.library.register_fake("paley::planes_pack", _planes_pack_fake, lib=library)
    return library


def _nearest_points(x: Tensor, points: Tensor) -> Tensor:
    if backend() == "native":
        return native.nearest_points(x, points)
    return nearest.reference(x, points)


def _trellis_codes(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    how = trellis_codes.codes if backend() == "native" else viterbi.reference
    return how(x, columns, scales, table, levels, costs, unit, bits, states, ends, spread, keep, ahead)


def _trellis_values(codes: Tensor, table: Tensor, bits: int) -> Tensor:
    return (trellis_codes.values if backend() == "native" else viterbi.reference_values)(codes, table, bits)


def _planes_pack(codes: Tensor, centroids: Tensor) -> Tensor:
    if _packs(codes, centroids):
        return native.pack_planes(codes, centroids)
    return codes.clone()


def _planes_pack_fake(codes: Tensor, centroids: Tensor) -> Tensor:
    if codes.device.type == "cpu" and _packs(codes, centroids):
        groups = centroids.shape[1]
        return codes.new_empty(native.blob_bytes(len(codes), groups, codes.shape[1] // groups))
    return codes.clone()


def _packs(codes: Tensor, centroids: Tensor) -> bool:
    """Whether native kernels accept this weight."""
    planes.check_weight(codes, centroids)
    return planes_fit(codes.shape[1] // centroids.shape[1])


@functools.cache
def _say_misfit(group_size: int) -> None:
    _LOG.warning(
        "no native plane kernels for groups of %d columns, only for multiples of 32 up to 512; they run without",
        group_size,
    )


def _planes_matmul(
    x_codes: Tensor, x_scales: Tensor, x_zeros: Tensor, weight: Tensor, centroids: Tensor | None, out: int
) -> Tensor:
    if backend() == "native" and centroids is None:
        return native.planes_matmul(x_codes, x_scales, x_zeros, weight, out)
    return planes.reference(x_codes, x_scales, x_zeros, weight, centroids, out)


register()
