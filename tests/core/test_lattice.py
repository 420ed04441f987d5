"""E8 against its geometry: 240 + 2160 vectors bound the Voronoi cell, so a point that beats them all is nearest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from paley.core import lattice
from paley.core.errors import PaleyError
from paley.core.lattice import E8Grid, e8_residual, nearest_e8


def rows(vectors) -> Tensor:
    return torch.tensor(list(vectors), dtype=torch.float64)


def voronoi_vectors() -> Tensor:
    """The vectors of E8 of squared length 2 and 4, [2400, 8]."""
    whole = torch.cat([rows(itertools.product((-1, 0, 1), repeat=8)), 2 * torch.eye(8).double(), -2 * torch.eye(8)])
    half = rows(itertools.product((-0.5, 0.5), repeat=8))
    longer = torch.cat([half * (1 + 2 * torch.eye(8)[i]) for i in range(8)])
    every = torch.cat([whole, half, longer])
    length = every.square().sum(1)
    return every[(every.sum(1) % 2 == 0) & (length > 0) & (length <= 4)]


VORONOI = voronoi_vectors()


def in_e8(x: Tensor) -> Tensor:
    whole, half = (x == x.floor()).all(-1), (x - 0.5 == (x - 0.5).floor()).all(-1)
    return (whole | half) & (x.sum(-1) % 2 == 0)


def in_cell(r: Tensor, q: int = 1, slack: float = 0.0) -> bool:
    """r [N, 8]: no vector of q·E8 is nearer than 0, |r| <= |r - q v| for all v that matter."""
    return bool((r @ VORONOI.T <= q * VORONOI.square().sum(1) / 2 + slack).all())


def quarters(n: int, seed: int = 0) -> Tensor:
    """Multiples of 1/4 [n, 8]: full of ties, and exact in float64."""
    return torch.randint(-40, 41, (n, 8), generator=torch.Generator().manual_seed(seed)).double() / 4


def e8_points(n: int, seed: int = 1) -> Tensor:
    points = torch.randint(-9, 10, (n, 8), generator=torch.Generator().manual_seed(seed)).double()
    points[:, 0] += points.sum(1) % 2
    return points + 0.5 * (torch.arange(n) % 2)[:, None]


def gaussian(n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_the_voronoi_cell_is_bounded_by_2400_vectors():
    assert VORONOI.square().sum(1).unique(return_counts=True)[1].tolist() == [240, 2160]
    assert in_e8(VORONOI).all()
    assert in_e8(e8_points(100)).all()


@pytest.mark.parametrize("x", [gaussian(2000) * 3, quarters(2000)], ids=["random", "ties"])
def test_no_point_of_e8_is_nearer(x):
    points = nearest_e8(x)
    assert in_e8(points).all()
    assert in_cell(x.double() - points, slack=1e-12)


def test_points_of_e8_are_their_own_nearest():
    points = e8_points(1000)
    assert torch.equal(nearest_e8(points), points)
    assert torch.equal(e8_residual(points), torch.zeros_like(points))


@pytest.mark.parametrize("q", [1, 2, 7])
def test_residuals_do_not_change_with_the_lattice_even_at_ties(q):
    x, shift = quarters(3000), e8_points(3000)
    assert torch.equal(e8_residual(x + q * shift, q), e8_residual(x, q))
    assert torch.equal(nearest_e8(x + shift), nearest_e8(x) + shift)


def test_ties_do_not_depend_on_the_neighbours_in_a_batch():
    x = quarters(60).float()
    grid = E8Grid(3, (0.75, 1.0))
    together = grid.nearest(x)
    assert torch.equal(together, torch.cat([grid.nearest(row[None]) for row in x]))
    assert torch.equal(together.flip(0), grid.nearest(x.flip(0)))


@pytest.mark.parametrize("q", [2, 3])
def test_each_code_is_a_point_of_its_own_within_q_voronoi_cells(q):
    grid = E8Grid(q, (1.0,))
    codes = torch.arange(grid.size)
    points = grid.decode(codes).double()
    assert grid.size == q**8 == len(points.unique(dim=0))
    assert in_e8(points).all()
    assert in_cell(points, q)
    assert torch.equal(grid.nearest(points.float()), codes)


def test_the_code_of_nesting_two_has_the_known_lengths():
    # The 256 classes of E8 modulo 2E8: 0, 240 / 2 pairs of length 2, 2160 / 16 frames of length 4.
    lengths, counts = E8Grid(2, (1.0,)).decode(torch.arange(256)).square().sum(1).unique(return_counts=True)
    assert dict(zip(lengths.tolist(), counts.tolist(), strict=True)) == {0: 1, 2: 120, 4: 135}


@pytest.mark.parametrize("q", [5, 14, 17])
def test_large_codes_stay_within_q_voronoi_cells(q):
    grid = E8Grid(q, (1.0,))
    codes = torch.randint(0, grid.size, (2000,), generator=torch.Generator().manual_seed(0))
    points = grid.decode(codes).double()
    assert in_e8(points).all()
    assert in_cell(points, q)
    assert torch.equal(grid.nearest(points.float()), codes)


@pytest.mark.parametrize("name", lattice.names())
def test_packaged_grids(name):
    grid = lattice.load(name)
    assert grid is lattice.load(name)
    assert grid.name == name == f"e8q{grid.q}k{len(grid.betas)}"
    assert (grid.p, grid.size) == (8, len(grid.betas) * grid.q**8)
    assert grid.bits == pytest.approx(math.log2(grid.size) / 8)
    assert list(grid.betas) == sorted(set(grid.betas))

    x = gaussian(25_000)
    codes = grid.nearest(x)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < grid.size
    points = grid.decode(codes)
    assert points.dtype == torch.float32
    assert torch.equal(grid.decode(grid.nearest(points)), points)

    error = (x - points).double().square().mean(1)
    spread = float(error.std()) / math.sqrt(len(x)) + lattice.record(name)["stderr"]
    assert abs(float(error.mean()) - grid.mse) < 4 * spread
    assert grid.mse * 4**grid.bits > 1  # Shannon


def test_of_several_scales_the_best_is_kept():
    x, betas = gaussian(4000), (0.3, 0.4, 0.7)
    several = (x - E8Grid(14, betas).round(x)).square().sum(1)
    single = torch.stack([(x - E8Grid(14, (beta,)).round(x)).square().sum(1) for beta in betas])
    assert torch.allclose(several, single.amin(0), rtol=0, atol=1e-5)
    assert (single.argmin(0).bincount() > 10).all()


def test_any_shape_of_codes_and_any_number_of_vectors():
    grid = E8Grid(4, (1.0, 2.0))
    codes = torch.randint(0, grid.size, (3, 5), generator=torch.Generator().manual_seed(0))
    assert grid.decode(codes).shape == (3, 5, 8)
    assert torch.equal(grid.decode(codes)[1, 2], grid.decode(codes[1, 2]))
    for n in (0, 1, lattice._TILE + 1):
        assert grid.nearest(gaussian(n)).shape == (n,)
    assert math.isnan(grid.mse)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("e8q14k", r"unknown lattice 'e8q14k': packaged are .*; did you mean 'e8q14k"),
        ("e8q16k5", r"did you mean 'e8q16k4'\?"),
        ("", r"unknown lattice ''"),
    ],
)
def test_unknown_lattices_are_refused(name, complaint):
    with pytest.raises(PaleyError, match=complaint):
        lattice.load(name)


@pytest.mark.parametrize(
    ("q", "betas", "complaint"),
    [
        (1, (1.0,), "nesting ratio q must be an integer of at least 2, got 1"),
        (2.5, (1.0,), r"got 2\.5"),
        (4, (), "betas must be positive and ascending"),
        (4, (0.0, 1.0), "positive"),
        (4, (2.0, 1.0), "ascending"),
        (4, (1.0, 1.0), "ascending"),
        (4, (1.0, math.nan), "ascending"),
        (4, (math.inf,), "ascending"),
        (240, (1.0,), "do not fit into 64 bits"),
    ],
)
def test_impossible_lattices_are_refused(q, betas, complaint):
    with pytest.raises(PaleyError, match=complaint):
        E8Grid(q, betas)


def test_vectors_of_another_length_are_refused():
    with pytest.raises(PaleyError, match=r"e8q4k1: vectors must be \[N, 8\], got \(3, 7\)"):
        E8Grid(4, (1.0,)).nearest(torch.zeros(3, 7))
