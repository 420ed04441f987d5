"""Grids: the points that values are rounded to. A grid is data; no code depends on the method that made it.

Families, with b bits: `int{b}` two's complement, `uint{b}` with a zero point, `odd{b}` the odd integers
(mid-rise: no zero, no wasted level), `gauss{b}` the Lloyd-Max points of N(0, 1), `nf{b}` and `af{b}` the points of
bitsandbytes and its successor. `p{p}n{n}`: n points in p dimensions with the least squared error for N(0, I)
(HIGGS, arXiv:2411.17525). `e8q{q}k{k}`: a lattice too large for a table, with the same interface.
`trellis{b}`: the value of a code depends on those before it (`paley.core.trellis`).
`free{b}` and `mirror{b}` have no points of their own: see `paley.core.free`.

All grids share one protocol: see `paley.core.fixed`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from paley.core import free, lattice, tables, trellis
from paley.core.errors import PaleyError, nearest_name
from paley.core.fixed import Fixed
from paley.core.free import FreeGrid
from paley.core.lattice import E8Grid
from paley.core.nearest import nearest_points
from paley.core.trellis import TrellisGrid

__all__ = [
    "FAMILIES", "AnyGrid", "FixedGrid", "FreeGrid", "Grid", "as_fixed", "as_grid", "custom", "custom_of", "family",
    "load", "names",
]  # fmt: skip

FAMILIES = ("int", "uint", "odd", "gauss")
MIN_BITS, MAX_BITS = 2, 8
MAX_POINTS, MAX_DIM = 4096, 8
_PROBES = 2**12  # vectors that test whether a grid is made for values of variance 1
_FEW = 16  # comparing with each edge beats a binary search up to about here
_PREFIX = "custom-"  # of the names of grids that came from files


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Fixed):
    """points [n, p] float64, ascending for p = 1; affine: values are scale * (point - zero), zero a code.

    known_mse: E |x - round(x)|^2 / p on N(0, I), if it was measured. unit: made for values of unit rms, so that no
    other scale is tried. gaussian: made for Gaussian values. packaged: `load` takes the name; other names are
    hashes of the points. Grids of the same name are equal.
    """

    name: str
    points: Tensor
    affine: bool = False
    known_mse: float | None = None
    unit: bool = False
    gaussian: bool = False
    packaged: bool = True

    def __repr__(self) -> str:
        return f"Grid({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Grid) and self.name == other.name)

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this or another process, is made from the name or the points."""
        return (load, (self.name,)) if self.packaged else (custom_of, (tuple(map(tuple, self.points.tolist())),))

    @property
    def best_scaled(self) -> bool:
        """Whether `gaussian_scale` is the scale of least error on N(0, 1)."""
        return self.packaged

    @property
    def size(self) -> int:
        return self.points.shape[0]

    @property
    def p(self) -> int:
        """The number of values in one code."""
        return self.points.shape[1]

    @property
    def bits(self) -> float:
        return math.log2(self.size) / self.p

    @functools.cached_property
    def peak(self) -> float:
        """The point that max|x| is scaled to. For two's complement it is the last one, although the first is larger."""
        return float(self.points.abs().max() if self.unit else self.points.max())

    @functools.cached_property
    def step(self) -> float | None:
        """The distance between neighbours if it is constant, else None."""
        if self.p != 1:
            return None
        points, n = self.points[:, 0], torch.arange(self.size)
        step = float(points[1] - points[0])
        # In float32, as rounding computes: the formula must give exactly the points of the table.
        even = torch.equal(n.float() * step + float(points[0]), points.float())
        return step if even else None

    @functools.cached_property
    def edges(self) -> Tensor:
        """Midpoints [n - 1] between neighbouring points (p = 1)."""
        return (self.points[1:, 0] + self.points[:-1, 0]) / 2

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors [N, p] float32 -> codes [N] of the nearest points. May write to `vectors`."""
        index = self._index(vectors[:, 0]) if self.p == 1 else nearest_points(vectors, self.points.to(vectors))
        return index.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """codes, integers [...] -> their points, float32 [..., p]."""
        points = self.points.to(device=codes.device, dtype=torch.float32)
        # Ten times faster than points[codes].
        return points.index_select(0, codes.flatten().int()).view(*codes.shape, self.p)

    def round(self, vectors: Tensor) -> Tensor:
        """vectors [N, p] float32 -> their nearest points: `decode(nearest(...))`. May write to `vectors`."""
        if self.step is None:
            return self.decode(self.nearest(vectors))
        return self._index(vectors).mul_(self.step).add_(float(self.points[0]))  # an even grid needs no table

    def _index(self, y: Tensor) -> Tensor:
        """p = 1: y of any shape -> indices of the nearest points, as floats if that is cheaper."""
        if self.step is not None:
            return y.sub_(float(self.points[0])).div_(self.step).round_().clamp_(0, self.size - 1)
        edges = self.edges.to(y)
        if len(edges) > _FEW:
            return torch.bucketize(y.contiguous(), edges, out_int32=True)
        index = torch.zeros_like(y, dtype=torch.uint8)
        for edge in edges.tolist():
            index += (y > edge).view(torch.uint8)  # adding bools themselves takes twice as long
        return index

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
        """The scale of least error on N(0, 1): 1 for `unit` grids, else a golden-section minimum of `gaussian_mse`."""
        if self.unit:
            return 1.0
        ratio = (math.sqrt(5) - 1) / 2
        low, high = 0.5 / self.peak, 8.0 / self.peak
        for _ in range(80):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            if self.gaussian_mse(a) < self.gaussian_mse(b):
                high = b
            else:
                low = a
        return (low + high) / 2

    @functools.cached_property
    def mse(self) -> float:
        """t^2 of the linearity theorem: relative squared error on Gaussian values, scaled by their rms."""
        if self.known_mse is not None:
            return self.known_mse
        if self.p == 1:
            return self.gaussian_mse(self.gaussian_scale)
        x = torch.randn(2**18, self.p, generator=torch.Generator().manual_seed(0))
        return float((self.round(x.clone()) - x).square().mean())

    @functools.cached_property
    def fit(self) -> tuple[float, float]:
        """On a few values of N(0, 1): the relative squared error, and how many times too short the points are."""
        x = torch.randn(_PROBES, self.p, generator=torch.Generator().manual_seed(0))
        points, x = self.round(x.clone()).double(), x.double()
        length, along = float(points.square().sum()), float((points * x).sum())
        error = float((points - x).square().sum() / x.square().sum())
        return error, along / length if length else math.inf

    def check_scaled(self, where: str) -> None:
        # `unbiased` scales go up to twice the rms. Shorter points cannot be stretched to unit variance.
        if self.packaged or (self.fit[0] < 1 and self.fit[1] < 2):
            return
        size = float(self.points.square().mean().sqrt())
        raise PaleyError(
            f"{where}: its points do not fit values of variance 1, which scales by rms are for: their relative squared "
            f"error on N(0, 1) is {self.fit[0]:.3g}, that of zeros 1, and the points have a root mean square of "
            f"{size:.3g}; scale the points to unit variance"
        )


FixedGrid = Grid | E8Grid | TrellisGrid
AnyGrid = FixedGrid | FreeGrid


@functools.cache
def load(name: str) -> AnyGrid:
    """The packaged grid called `name`, such as 'int4', 'gauss2', 'nf4', 'p2n256' or 'e8q14k4'."""
    if name.startswith(_PREFIX):
        raise PaleyError(f"grid {name!r}: its points are not known here; give the grid's file with --grid")
    if name in tables.names():
        points, mse = tables.gaussian_grid(name)
        return Grid(name, points.double(), known_mse=mse, unit=True, gaussian=True)
    if name in lattice.names():
        return lattice.load(name)
    if name.startswith("trellis"):
        return trellis.load(name)
    if name in free.names():
        return free.load(name)
    if name in _absmax_points():
        return Grid(name, _absmax_points()[name])
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    if match is None or match[1] not in FAMILIES:
        families = [f + "<bits>" for f in (*FAMILIES, "nf", "af")] + ["free<1-4>", "mirror<1-4>"]
        known = ", ".join([*families, "p<p>n<n>", "e8q<q>k<k>", "trellis<bits>"])
        hint = nearest_name(name, names()) + tables.how_to_make(name)
        raise PaleyError(f"unknown grid {name!r}: known are {known}{hint}")
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
    return Grid(name, points[:, None], affine=family == "uint", gaussian=family == "gauss")


def as_grid(grid: AnyGrid | str) -> AnyGrid:
    """A grid, or the packaged one of that name."""
    return load(grid) if isinstance(grid, str) else grid


def as_fixed(grid: AnyGrid | str) -> FixedGrid:
    """As `as_grid`; PaleyError for free grids, whose points do not follow from a scale."""
    if isinstance(loaded := as_grid(grid), FreeGrid):
        raise PaleyError(
            f"grid {loaded.name!r} is for weights, which store its points; inputs, keys and values take others, such "
            "as uint4"
        )
    return loaded


def custom(points: Tensor, where: str = "grid") -> Grid:
    """points [n, p] of your own -> a grid whose name is a hash of them.

    Scales by rms treat them as points for values of unit rms (`Grid.check_scaled`). For "absmax" and "mse" a multiple
    of the points is the same grid.
    """
    if points.ndim != 2 or not points.is_floating_point():
        raise PaleyError(f"{where}: points must be floats [n, p], got {points.dtype} {list(points.shape)}")
    n, p = points.shape
    if not (2 <= n <= MAX_POINTS and 1 <= p <= MAX_DIM):
        raise PaleyError(f"{where}: needs 2 to {MAX_POINTS} points in 1 to {MAX_DIM} dimensions, got shape [{n}, {p}]")
    points = points.detach().cpu().float().contiguous()
    if not points.isfinite().all():
        raise PaleyError(f"{where}: holds NaN or infinite points")
    if p == 1:
        points = points.sort(0).values
    if len(points.unique(dim=0)) < n:
        raise PaleyError(f"{where}: holds the same point twice")
    digest = hashlib.sha256(f"{n} {p} ".encode() + points.numpy().tobytes()).hexdigest()
    return Grid(_PREFIX + digest[:16], points.double(), unit=True, gaussian=True, packaged=False)


@functools.lru_cache(maxsize=64)
def custom_of(rows: tuple[tuple[float, ...], ...]) -> Grid:
    """As `custom`, from plain numbers."""
    if len({len(row) for row in rows}) != 1:
        raise PaleyError("points: must be lists of equal length")
    return custom(torch.tensor(rows, dtype=torch.float64), "points")


def names() -> list[str]:
    """Every packaged grid."""
    plain = [f"{family}{bits}" for family in FAMILIES for bits in range(MIN_BITS, MAX_BITS + 1)]
    return [*plain, *_absmax_points(), *tables.names(), *lattice.names(), *trellis.names(), *free.names()]


def family(grid: AnyGrid) -> list[AnyGrid]:
    """The grid and the packaged ones of its kind: other bits, or other points in the same number of dimensions."""
    if grid.sequential:
        return [load(name) for name in trellis.names()]
    if kind := re.fullmatch(r"([a-z]+)\d+", grid.name):
        return [load(name) for name in names() if re.fullmatch(rf"{kind[1]}\d+", name)]
    alike = [other for name in (*tables.names(), *lattice.names()) if (other := load(name)).p == grid.p]
    return alike if grid in alike else [grid, *alike]


@functools.cache
def _absmax_points() -> dict[str, Tensor]:
    """nf and af grids: points [n, 1] from -1 to 1, for blocks whose largest value is 1."""
    text = resources.files("paley.core").joinpath("tables/normalfloat.json").read_text()
    return {name: torch.tensor(p, dtype=torch.float64)[:, None] for name, p in json.loads(text)["points"].items()}


def _gaussian_points(bits: int) -> Tensor:
    """Points [2^bits] ascending; the file holds the positive half."""
    text = resources.files("paley.core").joinpath("tables/gaussian.json").read_text()
    half = torch.tensor(json.loads(text)["points"][str(bits)], dtype=torch.float64)
    return torch.cat([-half.flip(0), half])
