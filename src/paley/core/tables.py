"""Reads the packaged grids of least error for N(0, I_p); tools/make_gaussian_grids.py makes them.

A safetensors file is 8 bytes of length, that much JSON, and raw bytes: no reader is needed.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name

__all__ = ["gaussian_grid", "how_to_make", "names", "record", "size_of"]

MAX_POINTS, MAX_DIM = 4096, 4  # of the grids that the script makes


@functools.cache
def _file() -> tuple[dict, dict, bytearray]:
    """The place of each tensor, the record of each grid, and the raw bytes."""
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
    """'p2n256' -> points [256, 2] float32 (shared: read only), in lexicographic order; t2 = E|x - nearest|^2 / p."""
    t2 = record(name)["t2"]
    header, _, data = _file()
    n, p = header[name]["shape"]
    points = torch.frombuffer(data, dtype=torch.float32, count=n * p, offset=header[name]["data_offsets"][0])
    return points.view(n, p), t2


def record(name: str) -> dict:
    """The measurement of a grid: t2, its stderr, the number of samples, the seed; PaleyError for other names."""
    header, records, _ = _file()
    if name not in header:
        near = nearest_name(name, names())
        raise PaleyError(f"unknown grid {name!r}: no such Gaussian grid is packaged{near}{how_to_make(name)}")
    return records[name]


def size_of(name: str) -> tuple[int, int] | None:
    """'p2n100' -> (2, 100), packaged or not; None if the script makes no grid of that name."""
    match = re.fullmatch(r"p([1-9]\d*)n([1-9]\d*)", name)
    if match is None or int(match[1]) > MAX_DIM or not 2 <= int(match[2]) <= MAX_POINTS:
        return None
    return int(match[1]), int(match[2])


def how_to_make(name: str) -> str:
    """`; make it with ...` for the name of a grid that is not packaged but can be made, or an empty string."""
    if size_of(name) is None:
        return ""
    file = f"{name}.safetensors"
    return f"; or make it: python tools/make_gaussian_grids.py {name} --output {file}, then --grid {file}"
