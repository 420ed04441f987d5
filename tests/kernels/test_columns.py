"""The native loops of GPTQ give the codes of the torch code, for every kind of grid, on every level."""

from __future__ import annotations

import pytest
import torch

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.nearest import reference as nearest_reference
from paley.core.schemes import WeightScheme
from paley.kernels import available, columns, native
from paley.methods import gptq
from paley.methods.columns import descent, feedback, follow_, inverses
from paley.methods.gptq import quantize_gptq
from paley.methods.statistics import InputStatistics

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built")

# grid, group size, scale rule, outlier columns
CASES = [
    ("int4", None, "mse", 0), ("int2", 8, "absmax", 0), ("uint3", 8, "mse", 0), ("odd3", None, "mse", 0),
    ("uint4", 20, "mse_diagonal", 3), ("uint4", 20, "signed_diagonal", 0),
    ("gauss3", None, "rms", 0), ("gauss4", 10, "rms", 3), ("nf4", 20, "absmax", 0), ("int8", None, "mse", 0),
    ("p2n16", None, "rms", 0), ("p2n256", 20, "rms", 0), ("p3n64", None, "rms", 0), ("p3n64", 8, "rms", 0),
    ("p4n256", 40, "rms", 0), ("free2", 20, "em", 0), ("mirror2", 20, "em_diagonal", 4), ("free3", None, "em", 0),
    ("e8q14k4", None, "rms", 0),
]  # fmt: skip


def problem(rows=13, columns=280, tokens=600, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=g) @ mix
    statistics = InputStatistics()
    statistics.add(x + 0.1 * torch.randn(tokens, columns, generator=g), x)
    return torch.randn(rows, columns, generator=g), statistics


@pytest.mark.parametrize(("grid", "group", "search", "outliers"), CASES)
def test_a_layer_has_the_same_codes_without_native_kernels(monkeypatch, grid, group, search, outliers):
    weight, statistics = problem()
    scheme = WeightScheme(grid, group, method="gptq", scale_search=search, sweeps=2)
    chosen = torch.tensor([3, 100, 101, 279][:outliers], dtype=torch.int32) if outliers else None
    made = {}
    for backend in ("native", "reference"):
        monkeypatch.setenv("PALEY_BACKEND", backend)
        made[backend] = quantize_gptq(weight, statistics, scheme, outlier_columns=chosen)
    assert torch.equal(made["native"].codes, made["reference"].codes)
    assert torch.equal(made["native"].scales, made["reference"].scales)
    assert torch.equal(made["native"].dequantize(), made["reference"].dequantize())


@pytest.mark.parametrize("columns_", [1, 2, 7, 128])
@pytest.mark.parametrize("grid", ["int3", "nf4", "p2n64", "p3n64", "p4n4096"])
def test_all_levels_and_threads_agree(grid, columns_):
    g = torch.Generator().manual_seed(1)
    grid = grids.as_fixed(grid)
    weights, root = torch.randn(37, columns_, generator=g), torch.randn(columns_, columns_, generator=g)
    gram = root @ root.T + columns_ * torch.eye(columns_)
    spread = torch.linalg.cholesky(gram, upper=True)
    scales = torch.rand(37, 1, generator=g).add(0.5).expand(-1, columns_)
    inverse = inverses(gram, grid.p)
    table = columns.table_of(grid)
    results = []
    for level in native.LEVELS[: native.LEVELS.index(native.best_level()) + 1]:
        for threads in (1, 3):
            how = {"level": level, "threads": threads}
            codes, errors = columns.feedback(weights, spread, table, scales, None, **how)
            moved = columns.descent(weights, gram, inverse, codes, table, scales, None, **how)
            results.append((codes, errors, *moved))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("grid", ["p2n16", "p2n256", "p2n4096", "p3n64", "p3n4096", "p4n256", "p4n4096"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0])
def test_cells_lose_no_nearest_point(grid, spread):
    grid = grids.as_fixed(grid)
    x = torch.randn(4096, grid.p, generator=torch.Generator().manual_seed(2)) * spread
    points = grid.points.float()
    x[:64] = (points[:64] + points[1:65]) / 2 if len(points) > 64 else x[:64]  # ties, and nearly
    x[64] = torch.inf
    x[65] = -torch.inf
    table = columns.table_of(grid)
    codes, _ = columns.feedback(x, torch.eye(grid.p), table, torch.ones(1, 1).expand(len(x), grid.p), None)
    assert torch.equal(codes[:, 0], nearest_reference(x, points))


def test_the_native_loops_are_taken(monkeypatch):
    taken = []
    for name in ("feedback", "descent"):
        function = getattr(columns, name)
        monkeypatch.setattr(columns, name, lambda *a, n=name, f=function, **k: (taken.append(n), f(*a, **k))[1])
    weight, statistics = problem()
    quantize_gptq(weight, statistics, WeightScheme("p2n64", method="gptq", scale_search="rms", sweeps=1))
    assert taken == ["feedback"] * 3 + ["descent"] * 3  # 280 columns


def test_descent_never_raises_the_objective():
    weight, statistics = problem(seed=3)
    scheme = WeightScheme("p4n256", method="gptq", scale_search="rms")
    metric, target = statistics.metric(0.01), statistics.target(weight, 0.01)
    gram, book = metric.gram, gptq._codebook(target, scheme, torch.arange(280), 0, None, "weight")
    codes = gptq._feedback(target, metric.spread, book)

    def objective():
        rest = (target - book.values(codes)).double()
        return float((rest @ gram.double() * rest).sum())

    pull, before = (target - book.values(codes)) @ gram, objective()
    inverse = [inverses(gram[at : at + 128, at : at + 128], 4) for at in range(0, 280, 128)]
    for _ in range(4):
        gptq._descend_(pull, gram, inverse, codes, book)
        after = objective()
        assert after <= before * (1 + 1e-6)
        before = after
    torch.testing.assert_close(pull, (target - book.values(codes)) @ gram, rtol=1e-4, atol=1e-2)


def test_the_reference_and_the_kernels_move_alike(monkeypatch):
    weight, statistics = problem()
    gram, target = statistics.metric(0.01).gram, statistics.target(weight, 0.01)
    book = gptq._codebook(
        target, WeightScheme("p3n64", method="gptq", scale_search="rms"), torch.arange(280), 0, None, "w"
    )
    spread = torch.linalg.cholesky(gram, upper=True)[:127, :127]
    own, made = gram[:127, :127], []
    for backend in ("native", "reference"):
        monkeypatch.setenv("PALEY_BACKEND", backend)
        codes, errors = feedback(target[:, :127], spread, book, 0)
        made.append((codes, errors, *descent(target[:, :127], own, inverses(own, 3), codes, book, 0)))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_what_the_kernels_cannot_read_is_refused():
    table, scales = columns.table_of(grids.as_fixed("p2n16")), torch.ones(3, 8)
    good = torch.randn(3, 8)
    for weights, spread, zeros in (
        (good.double(), torch.eye(8), None),
        (good, torch.eye(7), None),
        (good, torch.eye(8), torch.zeros(3, 7)),
        (good, torch.eye(8), torch.zeros(8, 3).T),
    ):
        with pytest.raises(PaleyError, match="columns: "):
            columns.feedback(weights, spread, table, scales, zeros)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_moves_is_followed_to_the_bit(monkeypatch, threads):
    g = torch.Generator().manual_seed(0)
    pull, gram = torch.randn(37, 131, generator=g), torch.randn(29, 131, generator=g)
    moves = torch.randn(37, 29, generator=g) * (torch.rand(37, 29, generator=g) < 0.1)
    monkeypatch.setenv("PALEY_BACKEND", "reference")
    want = pull.clone()
    follow_(want, moves, gram)
    torch.testing.assert_close(want, pull - moves @ gram)
    for level in native.LEVELS[: native.LEVELS.index(native.best_level()) + 1]:
        got = pull.clone()
        columns.follow_(got, moves, gram, level=level, threads=threads)
        assert torch.equal(got, want)
    with pytest.raises(PaleyError, match="must be contiguous"):
        columns.follow_(pull[:, ::2], moves, gram[:, ::2])
