"""Reads the packaged grids of least error for N(0, I_p); benchmarks/make_gaussian_grids.py makes them.

A safetensors file is 8 bytes of length, that much JSON, and raw bytes: no reader is needed.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name

__all__ = ["gaussian_grid", "names", "record"]


@functools.cache
def _file() -> tuple[dict, dict, bytearray]:
    """Where each tensor lies, what is recorded of it, and the raw bytes."""
    raw = bytearray(resources.files("paley.core").joinpath("tables/gaussian_grids.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    records = json.loads(header.pop("__metadata__")["grids"])
    return header, records, raw[start:]


def names() -> list[str]:
    """Names of all grids, 'p1n2' to 'p4n4096', by dimension and then size."""
    return sorted(_file()[0], key=lambda name: [int(part) for part in name[1:].split("n")])


@functools.cache
def gaussian_grid(name: str) -> tuple[Tensor, float]:
    """'p2n256' -> points [256, 2] float32, not to be written to, in lexicographic order; t2 = E|x - nearest|^2 / p."""
    t2 = record(name)["t2"]
    header, _, data = _file()
    n, p = header[name]["shape"]
    points = torch.frombuffer(data, dtype=torch.float32, count=n * p, offset=header[name]["data_offsets"][0])
    return points.view(n, p), t2


def record(name: str) -> dict:
    """What was measured of a grid: t2, its stderr, on how many samples, and the seed; PaleyError for other names."""
    header, records, _ = _file()
    if name not in header:
        raise PaleyError(f"unknown grid {name!r}: no such Gaussian grid is packaged{nearest_name(name, names())}")
    return records[name]
