"""Nested E8 lattices with several scales, as in NestQuant (arXiv:2502.09720): grids with a rule instead of a table.

E8 = D8 ∪ (D8 + ½), with D8 the integer vectors of even sum. The code keeps the shortest point of each coset of q·E8 in
E8: q^8 points that fill q times the Voronoi cell of E8. A vector outside of it decodes to a wrong point. Therefore each
of k scales is tried, and the best is kept. Arithmetic on points of E8 is exact: multiples of ½ in float64.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.fixed import Fixed

__all__ = ["E8Grid", "e8_residual", "load", "names", "nearest_e8", "record"]

DIM = 8
_TILE = 2**13  # vectors at a time, for the cache: the working memory stays below 10 MB

# Rows generate E8: 2e1, e2 - e1, ..., e7 - e6 and ½(1, ..., 1).
_BASIS = torch.diag(torch.ones(DIM, dtype=torch.float64)) - torch.diag(torch.ones(DIM - 1, dtype=torch.float64), -1)
_BASIS[0, 0] = 2.0
_BASIS[-1] = 0.5


def e8_residual(x: Tensor, q: int = 1) -> Tensor:
    """x [..., 8] float64 -> x minus its nearest point of q·E8; ties depend on x modulo q·E8 alone."""
    whole, whole_odd, a = _rounded(x, q)
    half, half_odd, b = _rounded(x - q / 2, q)
    # They differ by q/2 modulo q in each coordinate, so the first coordinate decides a tie, in either order.
    take = (a < b) | ((a == b) & (whole[..., :1] < half[..., :1]))
    r = torch.where(take, whole, half)
    worst = r.abs().argmax(-1, keepdim=True)  # the first of equals
    at_worst = r.gather(-1, worst)
    other_side = torch.where(at_worst >= 0, -q, q) * torch.where(take, whole_odd, half_odd)
    return r.scatter_add_(-1, worst, other_side)


def _rounded(x: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., 8] -> x minus its nearest point of q·Z^8, 1 if that is not in q·D8, squared distance to q·D8."""
    steps = torch.floor((2 * x + q).div_(2 * q))  # a single rounding, so that points of E8 are exact: halves go up
    r = x - q * steps
    odd = steps.sum(-1, keepdim=True).remainder_(2)
    # Of q·D8 the nearest has the coordinate of largest |r| on the other side: (q - |r|)² in place of r².
    distance = r.square().sum(-1, keepdim=True) + odd * q * (q - 2 * r.abs().amax(-1, keepdim=True))
    return r, odd, distance


def nearest_e8(x: Tensor) -> Tensor:
    """x [..., 8] -> nearest point of E8, float64."""
    x = x.double()
    return ((x - e8_residual(x)) * 2).round() / 2  # removes the rounding error of x - (x - p)


@dataclass(frozen=True)
class E8Grid(Fixed):
    """betas: the scales, ascending; mse: t2 = E|x - nearest|^2 / 8 on N(0, 1), nan if it was not measured.

    Code = scale · q^8 + Σ z_i q^i, z the coordinates modulo q in the basis above.
    """

    q: int
    betas: tuple[float, ...]
    mse: float = math.nan

    points: ClassVar[None] = None  # a rule stands in for their table
    affine: ClassVar[bool] = False
    unit: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True
    packaged: ClassVar[bool] = True
    best_scaled: ClassVar[bool] = False
    step: ClassVar[float | None] = None
    gaussian_scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.q, int) or self.q < 2:
            raise PaleyError(f"E8 grid: nesting ratio q must be an integer of at least 2, got {self.q!r}")
        steps = zip((0.0, *self.betas), self.betas, strict=False)
        if not self.betas or not all(low < high < math.inf for low, high in steps):
            raise PaleyError(f"E8 grid: betas must be positive and ascending, got {self.betas}")
        if self.size >= 2**63:
            raise PaleyError(f"E8 grid: {len(self.betas)} scales of {self.q}^8 points do not fit into 64 bits")

    @property
    def name(self) -> str:
        return f"e8q{self.q}k{len(self.betas)}"

    @property
    def p(self) -> int:
        return DIM

    @property
    def size(self) -> int:
        return len(self.betas) * self.q**DIM

    @property
    def bits(self) -> float:
        return math.log2(self.size) / DIM

    @property
    def peak(self) -> float:
        """An upper bound on the coordinates of points: E8's covering radius is 1."""
        return self.q * self.betas[-1]

    def nearest(self, x: Tensor) -> Tensor:
        """x [N, 8] -> codes int64 [N]; of scales with equal error, the smallest."""
        if x.dim() != 2 or x.shape[1] != DIM:
            raise PaleyError(f"{self.name}: vectors must be [N, {DIM}], got {tuple(x.shape)}")
        codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for tile, out in zip(x.split(_TILE), codes.split(_TILE), strict=True):
            out.copy_(self._nearest(tile.double()))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [...] -> points float32 [..., 8]."""
        flat = codes.reshape(-1)
        out = torch.empty(len(flat), DIM, device=codes.device)
        for tile, rows in zip(flat.split(_TILE), out.split(_TILE), strict=True):
            coordinates = (tile[:, None] // self._places(tile)) % self.q
            leaders = e8_residual(coordinates.double() @ _BASIS.to(tile.device), self.q)
            betas = torch.tensor(self.betas, dtype=torch.float64, device=tile.device)
            rows.copy_(leaders * betas[tile // self.q**DIM, None])
        return out.view(*codes.shape, DIM)

    def round(self, x: Tensor) -> Tensor:
        """x [N, 8] -> `decode(nearest(x))`."""
        return self.decode(self.nearest(x))

    def _nearest(self, x: Tensor) -> Tensor:
        best = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        scale = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        points = torch.zeros_like(x)
        for i, beta in enumerate(self.betas):
            candidates = nearest_e8(x / beta)
            error = (x - e8_residual(candidates, self.q) * beta).square().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale.masked_fill_(better, i)
            points = torch.where(better[:, None], candidates, points)
        coordinates = (points @ torch.linalg.inv(_BASIS).to(x.device)).round().remainder(self.q).long()
        return scale * self.q**DIM + (coordinates * self._places(coordinates)).sum(-1)

    def _places(self, like: Tensor) -> Tensor:
        return torch.tensor([self.q**i for i in range(DIM)], device=like.device)


@functools.cache
def _table() -> dict:
    return json.loads(resources.files("paley.core").joinpath("tables/lattices.json").read_text())["grids"]


def names() -> list[str]:
    """Names of the packaged grids, by bits."""
    return sorted(_table(), key=lambda name: _table()[name]["bits"])


def record(name: str) -> dict:
    """The record of a packaged grid: q, betas, bits, t2 on N(0, 1), stderr, samples; PaleyError for other names."""
    if name not in _table():
        raise PaleyError(f"unknown lattice {name!r}: packaged are {', '.join(names())}{nearest_name(name, names())}")
    return _table()[name]


@functools.cache
def load(name: str) -> E8Grid:
    """'e8q14k4' -> nesting ratio 14 and the 4 scales of least error on N(0, 1)."""
    entry = record(name)
    return E8Grid(entry["q"], tuple(entry["betas"]), entry["t2"])
