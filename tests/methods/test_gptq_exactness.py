"""GPTQ against its definition in float64, and sweeps that never make any row worse."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import pad

from paley.core import grids
from paley.core.schemes import WeightScheme
from paley.methods.gptq import quantize_gptq
from paley.methods.statistics import InputStatistics

DAMP = 0.01


def problem(seed, rows, n, directions):
    """-> a Gaussian weight [rows, n], statistics of inputs that few directions dominate, and their damped gram."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * n, directions, generator=g) @ torch.randn(directions, n, generator=g)
    statistics = InputStatistics()
    statistics.add(inputs, inputs)
    gram = statistics.gram.double()
    gram += DAMP * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    return torch.randn(rows, n, generator=g), statistics, gram


def gptq(weight, statistics, scheme):
    return quantize_gptq(weight, statistics, scheme, share=0, damp=DAMP)


def distances_by_definition(weight, q, gram):
    """-> float64 [rows, codes, points]: how far each point is from the vector that meets it, after q's codes before.

    Every vector of grid.p columns is rounded as a whole; then all later columns move to the optimum.
    """
    grid, work, width, found = q.grid, weight.double(), weight.shape[1], []
    scales, rounded = q.scales.double().repeat_interleave(q.group_size, 1), q.dequantize().double()
    for start in range(0, width, grid.p):
        stop = min(start + grid.p, width)
        vectors = pad(work[:, start:stop] / scales[:, start:stop], (0, grid.p - (stop - start)))
        found.append((vectors[:, None] - grid.points).norm(dim=-1))
        inverse, own = torch.linalg.inv(gram[start:, start:]), slice(0, stop - start)
        error = work[:, start:stop] - rounded[:, start:stop]
        work[:, stop:] -= error @ torch.linalg.inv(inverse[own, own]) @ inverse[own, stop - start :]
    return torch.stack(found, 1)


@pytest.mark.parametrize("grid", ["gauss2", "p2n16", "p2n64", "p3n64", "p4n64", "p4n256"])
@pytest.mark.parametrize(("n", "group_size"), [(24, None), (30, 10), (133, 19)])  # ragged, across groups and blocks
def test_every_code_is_the_nearest_after_the_feedback_of_those_before(grid, n, group_size):
    weight, statistics, gram = problem(seed=n, rows=8, n=n, directions=n // 2)
    q = gptq(weight, statistics, WeightScheme(grid, group_size, scale_search="rms", sweeps=0))
    distances = distances_by_definition(weight, q, gram)
    chosen = distances.gather(-1, q.codes.long()[..., None])[..., 0]
    assert (chosen - distances.amin(-1)).max() < 1e-4  # no other code but where float32 cannot tell


@pytest.mark.parametrize("grid", ["int3", "uint4", "gauss2", "p2n16", "p2n64", "p3n64", "p4n16", "p4n256"])
@pytest.mark.parametrize("group_size", [None, 8, 4])
def test_no_sweep_raises_the_error_of_any_row(grid, group_size):
    """Of vectors the nearest point may be worse than the one before, in the metric of the inputs."""
    search = "rms" if grids.load(grid).p > 1 else "mse"
    for seed, directions in enumerate((2, 4, 12)):
        weight, statistics, gram = problem(seed, rows=64, n=24, directions=directions)
        errors = []
        for sweeps in range(4):
            scheme = WeightScheme(grid, group_size, scale_search=search, sweeps=sweeps)
            missed = weight.double() - gptq(weight, statistics, scheme).dequantize().double()
            errors.append((missed @ gram * missed).sum(1))
        for before, after in pairwise(errors):
            assert (after <= 1.0001 * before).all()
        assert errors[-1].sum() < errors[0].sum()
