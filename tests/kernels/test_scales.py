"""The native search of weight scales finds those of the torch code, on every level."""

from __future__ import annotations

import pytest
import torch

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.schemes import WeightScheme
from paley.kernels import available, native, scales
from paley.methods.nearest import weight_scales

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built")

# grid, group size, scale rule
CASES = [
    ("uint4", 32, "signed"), ("uint5", 4, "signed"), ("uint4", 20, "mse"), ("int4", None, "mse"), ("odd3", None, "mse"),
    ("nf4", 20, "mse"), ("gauss5", 20, "mse"), ("int8", None, "mse"),
]  # fmt: skip


def weight(rows=37, columns=160) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, rows)[:, None]
    made[1], made[2, 5] = 0, 900
    return made


@pytest.mark.parametrize(("grid", "group", "search"), CASES)
def test_scales_are_those_of_the_torch_code(monkeypatch, grid, group, search):
    found = {}
    for backend in ("native", "reference"):
        monkeypatch.setenv("PALEY_BACKEND", backend)
        scheme = WeightScheme(grid, group, scale_search=search)
        weighed = weight_scales(weight(), scheme, importance=torch.logspace(-3, 5, 160))
        found[backend] = *weight_scales(weight(), scheme), *weighed
    assert not torch.equal(found["native"][0], found["native"][2])
    for native_, reference in zip(*found.values(), strict=True):
        assert (native_ is None) == (reference is None)
        assert native_ is None or torch.equal(native_, reference)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 100])
@pytest.mark.parametrize("grid", ["uint4", "odd3", "nf4"])
def test_all_levels_and_threads_find_the_least_error(grid, size, affine, weighed):
    g = torch.Generator().manual_seed(size)
    x, tried = torch.randn(50, 3, size, generator=g), torch.rand(50, 3, 9, generator=g) + 0.05
    tried[..., 6] = tried[..., 2]  # of equal ones the first
    zeros = torch.randint(0, 4, tried.shape, generator=g).float() if affine else None
    if zeros is not None:
        zeros[..., 6] = zeros[..., 2]
    importance = torch.rand(3, size, generator=g) if weighed else None
    grid = grids.as_fixed(grid)
    points, errors = grid.points.flatten().double(), []
    for k in range(9):
        scale, zero = tried[..., k : k + 1].double(), 0 if zeros is None else zeros[..., k : k + 1].double()
        values = (points - zero[..., None] if affine else points) * scale[..., None]
        squares = (values - x.double()[..., None]).square().amin(-1)
        errors.append((squares if importance is None else squares * importance).sum(-1))
    errors = torch.stack(errors, -1)
    found = scales.best(x, grid, tried, zeros, importance)
    assert not (found == 6).any()
    torch.testing.assert_close(errors.gather(-1, found), errors.amin(-1, keepdim=True), rtol=1e-5, atol=0)
    for level in native.LEVELS[: native.LEVELS.index(native.best_level()) + 1]:
        for threads in (1, 3):
            assert torch.equal(scales.best(x, grid, tried, zeros, importance, level=level, threads=threads), found)


def test_other_numbers_and_shapes_are_refused():
    x, tried, grid = torch.randn(4, 2, 8), torch.ones(4, 2, 3), grids.as_fixed("uint4")
    with pytest.raises(PaleyError, match="reads float32"):
        scales.best(x.double(), grid, tried, None)
    with pytest.raises(PaleyError, match="reads float32"):
        scales.best(x, grid, tried, torch.ones(4, 2, 2))
    with pytest.raises(PaleyError, match="reads float32"):
        scales.best(x, grid, tried, None, torch.ones(8))
