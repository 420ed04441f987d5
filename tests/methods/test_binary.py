from itertools import combinations, pairwise

import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.schemes import WeightScheme
from paley.methods import binary
from paley.methods.binary import fit_centroids
from paley.methods.nearest import quantize_nearest

SIZES = [(2, False), (3, False), (4, False), (16, False), (2, True), (4, True), (8, True)]


def problem(kind="gaussian", rows=64, groups=3, k=32, seed=0):
    """-> values [rows, groups, k] and importance [groups, k], uneven and sometimes 0."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, groups, k, generator=g)
    if kind == "heavy":
        values = values / torch.rand(rows, groups, k, generator=g).sqrt()
    if kind == "ties":
        values = (values * 2).round()
    importance = torch.randn(groups, k, generator=g).mul(1.5).exp()
    return values, importance * (torch.rand(groups, k, generator=g) > 0.1)


def every_point(points, mirrored):
    return torch.cat([-points.flip(-1), points], -1) if mirrored else points


def error(values, importance, points, mirrored=False):
    """-> sum h (w - nearest)^2 [rows, groups], in float64 and the long way."""
    points = every_point(points.double(), mirrored)
    squares = (values.double()[..., None] - points[..., None, :]).square().amin(-1)
    return (squares if importance is None else squares * importance.double()).sum(-1)


def least_error(values, importance, count):
    """The optimum [...]: its cells are neighbours in sorted order, so all partitions of that are tried."""
    w, order = values.double().sort(-1)
    h, k = importance.double().expand(values.shape).gather(-1, order), values.shape[-1]
    best = torch.full(values.shape[:-1], torch.inf, dtype=torch.float64)
    for inner in combinations(range(1, k), count - 1):
        total = torch.zeros_like(best)
        for a, b in zip((0, *inner), (*inner, k), strict=True):
            part, weight = w[..., a:b], h[..., a:b]
            mean = (weight * part).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-300)
            total += (weight * (part - mean).square()).sum(-1)
        best = torch.minimum(best, total)
    return best


@pytest.mark.parametrize(("size", "mirrored"), SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "ties"])
def test_no_round_raises_the_error(kind, size, mirrored):
    values, importance = problem(kind)
    values = values.abs() if mirrored else values
    groups = binary._sort(values.flatten(0, 1), importance.expand(values.shape).flatten(0, 1))
    weight = importance / importance.amax(-1, keepdim=True)
    for start in binary._starts(groups, size // 2 if mirrored else size, mirrored):
        errors = [error(values, weight, p.view(64, 3, -1)) for p in (start, *binary._rounds(groups, start, 50))]
        assert all((after <= before + 1e-9).all() for before, after in pairwise(errors))
        assert len(errors) < 51  # nothing changed any more
        assert errors[-1].sum() < errors[0].sum()


@pytest.mark.parametrize(
    ("size", "mirrored", "slack"), [(2, False, 1.1), (3, False, 1.13), (4, False, 1.2), (4, True, 1.06)]
)
@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_error_is_close_to_the_optimum_and_never_below(kind, size, mirrored, slack):
    values, _ = problem(kind, rows=100, groups=2, k=11)
    importance = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) + 0.05
    found = error(values, importance, fit_centroids(values, importance, size, mirrored=mirrored), mirrored)
    best = least_error(values.abs() if mirrored else values, importance, size // 2 if mirrored else size)
    assert (found > best * (1 - 1e-9)).all()
    assert found.sum() < slack * best.sum()
    assert (found < 1.001 * best).double().mean() > 0.6


def test_one_scale_is_the_weighted_mean_of_magnitudes():
    values, importance = problem()
    expected = (values.abs() * importance).sum(-1, keepdim=True) / importance.sum(-1, keepdim=True)
    torch.testing.assert_close(fit_centroids(values, importance, 2, mirrored=True), expected, rtol=1e-3, atol=0)


def test_empty_cells_are_reseeded():
    values = torch.tensor([0.0] * 60 + [1.0, 2.0, 50.0, 51.0]).view(1, 1, -1)
    groups = binary._sort(values.flatten(0, 1), torch.ones(1, 64))
    start = torch.zeros(1, 4, dtype=torch.float64)
    bounds = binary._cells(groups, start)
    assert (bounds.diff() == 0).sum() == 3
    points, bounds = binary._reseed(groups, start, bounds)
    assert (bounds.diff() > 0).all()
    assert error(values, None, points[None]) < error(values, None, start[None])
    *_, points = binary._rounds(groups, start, 20)
    assert error(values, None, points[None]) == 0.5  # {0} {1 2} {50} {51}, or {0} {1} {2} {50 51}


@pytest.mark.parametrize(("size", "mirrored"), SIZES)
def test_few_values_are_exact(size, mirrored):
    g = torch.Generator().manual_seed(0)
    values, importance = torch.zeros(40, 2, 64), torch.rand(64, generator=g).mul(20).exp()
    for row in range(values.shape[0]):  # one value that fills the group, and 0 to size - 1 others
        others = torch.arange(row % (size // 2 if mirrored else size))
        values[row] = 0.37  # no float16 value
        values[row, :, others * 3] = 2.0 ** (others - 8) * (-1) ** others
    values = values.half().float()
    for h in (None, importance):
        assert not error(values, h, fit_centroids(values, h, size, mirrored=mirrored), mirrored).any()


@pytest.mark.parametrize("value", [0.0, 1.5, -0.0001, 65504.0, -3e38, 3e38])
def test_constants_are_exact_and_never_infinite(value):
    values = torch.full((2, 3, 8), value)
    points = fit_centroids(values, None, 4)
    assert torch.equal(points, torch.full((2, 3, 4), value).clamp(-65504, 65504).half().float())


@pytest.mark.parametrize("mirrored", [False, True])
def test_importance_zero_is_no_influence(mirrored):
    values, importance = problem(k=64)
    importance[:, 5:40] = 0
    other = torch.where(importance == 0, values.flip(0) * 1e4, values)
    fit = fit_centroids(values, importance, 4, mirrored=mirrored)
    assert torch.equal(fit, fit_centroids(other, importance, 4, mirrored=mirrored))
    kept = importance[0] > 0
    assert torch.equal(fit[:, :1], fit_centroids(values[:, :1, kept], importance[:1, kept], 4, mirrored=mirrored))
    importance[1] = 0
    fit = fit_centroids(values, importance, 4, mirrored=mirrored)
    assert (fit[:, 1] == 0).all()
    assert (fit[:, 0] != 0).any()


def test_importance_is_a_multiplicity():
    values, _ = problem(k=24)
    times = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))
    weighted, repeated = fit_centroids(values, times.float(), 4), values.repeat_interleave(times, -1)
    found, expected = (error(repeated, None, p).sum() for p in (weighted, fit_centroids(repeated, None, 4)))
    assert abs(found / expected - 1) < 0.03  # their starts differ


@pytest.mark.parametrize(("size", "mirrored"), SIZES)
def test_scales_with_the_values_and_not_with_the_importance(size, mirrored):
    values, importance = problem()
    fit = fit_centroids(values, importance, size, mirrored=mirrored)
    assert torch.equal(fit_centroids(values * 8, importance * 1024, size, mirrored=mirrored), fit * 8)


@pytest.mark.parametrize(("size", "mirrored"), SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "ties"])
def test_points_are_ascending_float16(kind, size, mirrored):
    values, importance = problem(kind)
    points = fit_centroids(values * 0.02, importance, size, mirrored=mirrored)
    assert points.shape == (64, 3, size // 2 if mirrored else size)
    assert points.dtype == torch.float32
    assert torch.equal(points, points.half().float())
    assert (points.diff() >= 0).all()
    if mirrored:
        assert (points >= 0).all()
        assert torch.equal(points, fit_centroids(-values * 0.02, importance, size, mirrored=True))


def test_rows_and_blocks_are_independent(monkeypatch):
    values, importance = problem()
    fit = fit_centroids(values, importance, 4)
    assert torch.equal(fit, fit_centroids(values, importance, 4))
    assert torch.equal(fit[7:9, 1:2], fit_centroids(values[7:9, 1:2], importance[1:2], 4))
    monkeypatch.setattr(binary, "_BLOCK", 500)
    assert torch.equal(fit, fit_centroids(values, importance, 4))
    assert torch.equal(fit, fit_centroids(values, importance.expand(64, 3, 32).double(), 4))


def test_more_points_and_importance_pay():
    values, importance = problem(k=128)
    four, mirror, two = (
        fit_centroids(values, importance, n, mirrored=m) for n, m in [(4, False), (4, True), (2, True)]
    )
    blind = fit_centroids(values, None, 4)
    assert error(values, importance, four).sum() < error(values, importance, mirror, True).sum()
    assert error(values, importance, mirror, True).sum() < 0.5 * error(values, importance, two, True).sum()
    assert error(values, importance, four).sum() < 0.9 * error(values, importance, blind).sum()


@pytest.fixture(scope="module")
def gaussian():
    """2^19 values of N(0, 1) in groups of 128 [rows, 1, 128]; a mean of squared errors varies by .1 to .3%."""
    return torch.randn(2**12, 1, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "mirrored", "expected"), [(4, False, 0.1077), (4, True, 0.1138), (2, True, 0.361)])
def test_squared_errors_on_gaussian_groups_of_128(gaussian, size, mirrored, expected):
    found = error(gaussian, None, fit_centroids(gaussian, None, size, mirrored=mirrored), mirrored)
    assert 0.985 * expected < float(found.sum() / gaussian.double().square().sum()) < 1.005 * expected


def test_squared_error_of_two_bit_integers_on_gaussian_groups_of_128(gaussian):
    weight = gaussian[:, 0]
    missed = weight - quantize_nearest(weight, WeightScheme("uint2", 128, scale_search="absmax")).dequantize()
    assert float(missed.square().sum() / weight.square().sum()) == pytest.approx(0.251, rel=0.015)


def test_small_and_empty_shapes():
    assert fit_centroids(torch.zeros(0, 2, 8), None, 4).shape == (0, 2, 4)
    assert torch.equal(fit_centroids(torch.tensor([[[-2.0]]]), None, 2), torch.tensor([[[-2.0, -2.0]]]))
    assert torch.equal(fit_centroids(torch.tensor([[[-2.0]]]), None, 2, mirrored=True), torch.tensor([[[2.0]]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1}, "a number of centroids from 2 to 16, got 1"),
        ({"size": 17}, "got 17"),
        ({"size": 5, "mirrored": True}, "an even number of centroids from 2 to 16, got 5"),
        ({"rounds": 0}, "at least one round of EM, got 0"),
        ({"values": torch.zeros(4, 8)}, r"values must be \[rows, groups, k >= 1\], got \[4, 8\]"),
        ({"values": torch.zeros(4, 1, 0)}, r"got \[4, 1, 0\]"),
        ({"values": torch.tensor([[[0, torch.nan, torch.inf]]])}, "2 of 3 values are NaN or infinite"),
        ({"importance": torch.ones(7)}, r"importance \[7\] does not fit values \[4, 1, 8\]"),
        ({"importance": torch.ones(2, 4, 1, 8)}, "does not fit"),
        ({"importance": torch.tensor([-1.0])}, "1 of 1 importances are NaN, infinite or negative"),
        ({"importance": torch.full((8,), torch.nan)}, "8 of 8 importances"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"values": torch.zeros(4, 1, 8), "importance": None, "size": 4} | change
    with pytest.raises(PaleyError, match=f"^layer 3: .*{message}"):
        fit_centroids(**arguments, where="layer 3")
