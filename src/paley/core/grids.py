"""Grids: the points that rounding may land on. A grid is data; no code asks which method it came from.

Families, with b bits: `int{b}` two's complement, `uint{b}` with a zero point, `odd{b}` the odd integers
(mid-rise: no zero, no wasted level), `gauss{b}` the Lloyd-Max points of N(0, 1).
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name

__all__ = ["FAMILIES", "Grid", "load"]

FAMILIES = ("int", "uint", "odd", "gauss")
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, eq=False)
class Grid:
    """points [n, p] float64, ascending for p = 1; affine: values are scale * (point - zero), zero a code.

    peak: the point that max|x| is scaled to. gaussian_scale: the scale of least error on N(0, 1).
    step: the distance of neighbours where it is constant, else None.
    """

    name: str
    points: Tensor
    affine: bool = False

    @property
    def bits(self) -> float:
        return math.log2(self.points.shape[0]) / self.points.shape[1]

    @functools.cached_property
    def peak(self) -> float:
        return float(self.points.max())

    @functools.cached_property
    def step(self) -> float | None:
        if self.points.shape[1] != 1:
            return None
        steps = self.points[:, 0].diff()
        return float(steps[0]) if torch.allclose(steps, steps[:1], rtol=1e-12) else None

    @functools.cached_property
    def edges(self) -> Tensor:
        """Midpoints [n - 1] between neighbouring points (p = 1)."""
        return (self.points[1:, 0] + self.points[:-1, 0]) / 2

    def gaussian_mse(self, scale: float) -> float:
        """E (x - round(x))^2 for x ~ N(0, 1) on the grid times `scale` (p = 1), by exact integration."""
        p, e = self.points[:, 0] * scale, self.edges * scale
        e = torch.cat([e.new_tensor([-torch.inf]), e, e.new_tensor([torch.inf])])
        cdf = torch.special.ndtr(e)
        pdf = torch.exp(-e.square() / 2) / math.sqrt(2 * math.pi)
        mass, first = cdf.diff(), -pdf.diff()
        # E x^2 = 1; on each cell: -2 p E[x; cell] + p^2 P(cell)
        return float(1 - 2 * (p * first).sum() + (p.square() * mass).sum())

    @functools.cached_property
    def gaussian_scale(self) -> float:
        """Golden-section minimum of `gaussian_mse`."""
        ratio = (math.sqrt(5) - 1) / 2
        low, high = 0.5 / self.peak, 8.0 / self.peak
        for _ in range(80):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            if self.gaussian_mse(a) < self.gaussian_mse(b):
                high = b
            else:
                low = a
        return (low + high) / 2


@functools.cache
def load(name: str) -> Grid:
    """The grid called `name`, such as 'int4', 'uint3', 'odd3' or 'gauss2'."""
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    if match is None or match[1] not in FAMILIES:
        hint = nearest_name(name, [f"{f}{b}" for f in FAMILIES for b in range(MIN_BITS, MAX_BITS + 1)])
        raise PaleyError(f"unknown grid {name!r}: known are {', '.join(f + '<bits>' for f in FAMILIES)}{hint}")
    family, bits = match[1], int(match[2])
    if not MIN_BITS <= bits <= MAX_BITS:
        raise PaleyError(f"grid {name!r}: bits must be between {MIN_BITS} and {MAX_BITS}, got {bits}")
    n = 2**bits
    if family == "gauss":
        points = _gaussian_points(bits)
    elif family == "odd":
        points = torch.arange(1 - n, n, 2, dtype=torch.float64)
    elif family == "int":
        points = torch.arange(-n // 2, n // 2, dtype=torch.float64)
    else:
        points = torch.arange(n, dtype=torch.float64)
    return Grid(name, points[:, None], affine=family == "uint")


def _gaussian_points(bits: int) -> Tensor:
    """Points [2^bits] ascending; the file holds the positive half."""
    text = resources.files("paley.core").joinpath("tables/gaussian.json").read_text()
    half = torch.tensor(json.loads(text)["points"][str(bits)], dtype=torch.float64)
    return torch.cat([-half.flip(0), half])
