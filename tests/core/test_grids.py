"""Grids against the mathematics that made them: Lloyd-Max conditions, exact points, least errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError

BITS = range(grids.MIN_BITS, grids.MAX_BITS + 1)
NAMES = [f"{family}{bits}" for family in grids.FAMILIES for bits in BITS]


def gaussian_average(f, low: float = -12.0, high: float = 12.0, n: int = 2_000_001) -> float:
    """E f(x) for x ~ N(0, 1) by the trapezoidal rule: no integral that the code under test solves as well."""
    x = torch.linspace(low, high, n, dtype=torch.float64)
    return float(torch.trapezoid(f(x) * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi), x))


def squared_error(points: Tensor):
    def f(x: Tensor) -> Tensor:
        upper = torch.searchsorted(points, x).clamp(max=len(points) - 1)
        lower = (upper - 1).clamp(min=0)
        return torch.minimum((x - points[upper]).abs(), (x - points[lower]).abs()).square()

    return f


def cell_means(edges: Tensor) -> Tensor:
    """Edges [n - 1], ascending and symmetric -> E[x | x in cell] of each of the n cells of N(0, 1)."""
    e = torch.cat([edges.new_tensor([-torch.inf]), edges[: len(edges) // 2 + 1]])  # the half where ndtr is exact
    density = torch.exp(-e.square() / 2) / math.sqrt(2 * math.pi)
    means = -density.diff() / torch.special.ndtr(e).diff()
    return torch.cat([means, -means.flip(0)])


@pytest.mark.parametrize("name", NAMES)
def test_every_grid_has_its_points_in_order(name):
    grid = grids.load(name)
    assert grid is grids.load(name)
    assert grid.name == name
    assert grid.bits == int(name[-1])
    assert grid.points.shape == (2 ** int(name[-1]), 1)
    assert grid.points.dtype == torch.float64
    assert (grid.points[:, 0].diff() > 0).all()
    assert grid.peak == grid.points[-1, 0]
    assert (2 * grid.edges - grid.points[1:, 0] - grid.points[:-1, 0]).abs().max() < 1e-12
    assert grid.affine == name.startswith("uint")


@pytest.mark.parametrize("bits", BITS)
def test_the_points_of_even_grids(bits):
    n = 2**bits
    for family, expected, step in (
        ("int", range(-n // 2, n // 2), 1.0),
        ("uint", range(n), 1.0),
        ("odd", range(1 - n, n, 2), 2.0),
    ):
        grid = grids.load(f"{family}{bits}")
        assert grid.points[:, 0].tolist() == list(expected)
        assert grid.step == step
    assert grids.load("int3").points[:, 0].tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert grids.load("odd2").points[:, 0].tolist() == [-3, -1, 1, 3]


@pytest.mark.parametrize("bits", BITS)
def test_each_gaussian_point_is_the_mean_of_its_cell(bits):
    grid = grids.load(f"gauss{bits}")
    points = grid.points[:, 0]
    assert grid.step is None
    assert torch.equal(points, -points.flip(0))
    assert (points - cell_means(grid.edges)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("bits", "mse", "rel"),
    # t^2 of HIGGS (arXiv:2411.17525, p = 1); 8 bits by Panter and Dite's pi sqrt(3) / 2 / 4^8.
    [(2, 0.1175, 0.01), (3, 0.0345, 0.01), (4, 0.0095, 0.01), (8, 4.1e-5, 0.015)],
)
def test_gaussian_grids_have_the_errors_that_are_known(bits, mse, rel):
    grid = grids.load(f"gauss{bits}")
    assert grid.gaussian_mse(1.0) == pytest.approx(mse, rel=rel)
    assert gaussian_average(squared_error(grid.points[:, 0])) == pytest.approx(grid.gaussian_mse(1.0), rel=1e-6)


@pytest.mark.parametrize("name", ["int2", "int3", "odd3", "uint4", "gauss3"])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_mean_squared_error_is_the_integral(name, scale):
    grid = grids.load(name)
    expected = gaussian_average(squared_error(grid.points[:, 0] * scale))
    assert grid.gaussian_mse(scale) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("uint")])
def test_no_scale_is_better_than_the_gaussian_scale(name):
    grid = grids.load(name)
    best = grid.gaussian_mse(grid.gaussian_scale)
    others = [grid.gaussian_mse(f * grid.gaussian_scale) for f in torch.linspace(0.4, 2.5, 212).tolist()]
    assert best <= min(others) * (1 + 1e-9)
    for factor in (0.99, 1.01):
        assert grid.gaussian_mse(factor * grid.gaussian_scale) > best
    if name.startswith("gauss"):
        assert grid.gaussian_scale == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_a_lloyd_max_grid_beats_every_even_grid(bits):
    best = {family: grids.load(f"{family}{bits}") for family in ("gauss", "odd", "int")}
    errors = [grid.gaussian_mse(grid.gaussian_scale) for grid in best.values()]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("int1", r"grid 'int1': bits must be between 2 and 8, got 1"),
        ("gauss9", r"bits must be between 2 and 8, got 9"),
        ("uint16", r"got 16"),
        ("nf9", r"unknown grid 'nf9': known are int<bits>, uint<bits>, odd<bits>, gauss<bits>"),
        ("gaus3", r"did you mean 'gauss3'\?"),
        ("int", r"unknown grid 'int'"),
        ("int4 ", r"unknown grid 'int4 '"),
        ("INT4", r"unknown grid 'INT4'"),
        ("", r"unknown grid ''"),
    ],
)
def test_unknown_grids_are_refused(name, complaint):
    with pytest.raises(PaleyError, match=complaint):
        grids.load(name)


def test_a_family_is_what_is_packaged_of_a_kind():
    def family(name):
        return [grid.name for grid in grids.family(grids.load(name))]

    assert family("uint4") == [f"uint{bits}" for bits in BITS]
    assert family("int2") == [f"int{bits}" for bits in BITS]
    assert family("nf4") == ["nf2", "nf3", "nf4"]
    assert family("af3") == ["af3", "af4"]
    assert family("e8q14k4") == [name for name in grids.names() if name.startswith("e8")]
    pairs = [name for name in grids.names() if name.startswith("p2n")]
    assert family("p2n88") == pairs
    own = grids.custom(torch.tensor([[0.0, 1.0], [1.0, -2.0]]))
    assert grids.family(own) == [own, *map(grids.load, pairs)]
