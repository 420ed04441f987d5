"""GPTQ with points of each group's own, and with outlier columns."""

import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.schemes import WeightScheme
from paley.methods.binary import fit_centroids
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.methods.statistics import InputStatistics

FREE = ["free1", "free2", "mirror2", "free3"]
SEARCHES = ["em", "em_diagonal", "em_inverse"]


def problem(out=24, n=48, tokens=400, loud=()):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=g) / n**0.5
    inputs = torch.randn(tokens, n, generator=g) @ mix
    inputs[:, list(loud)] *= 30
    s = InputStatistics()
    s.add(inputs, inputs)
    return torch.randn(out, n, generator=g), inputs, s


def loss(weight, q, inputs):
    return float((inputs @ (weight - q.dequantize()).T).square().sum())


def gptq(weight, s, scheme, **options):
    return quantize_gptq(weight, s, scheme, share=0, damp=1e-4, **options)


@pytest.mark.parametrize("grid", FREE)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("group_size", [None, 16])
def test_error_feedback_beats_rounding_by_itself(grid, search, group_size):
    weight, inputs, s = problem()
    scheme = WeightScheme(grid, group_size, scale_search=search)
    q = gptq(weight, s, scheme)
    alone = quantize_gptq(weight, s, WeightScheme(grid, group_size, "nearest", search))
    assert loss(weight, q, inputs) < 0.7 * loss(weight, alone, inputs)
    assert q.group_size == (group_size or 48)
    points = q.grid.group_points(q.scales.float())
    assert (points.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("grid", FREE)
def test_each_sweep_lowers_the_error(grid):
    weight, inputs, s = problem()
    losses = [loss(weight, gptq(weight, s, WeightScheme(grid, 16, scale_search="em_diagonal", sweeps=k)), inputs)
              for k in range(4)]  # fmt: skip
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("grid", FREE)
def test_white_inputs_give_the_nearest_codes(grid):
    weight, white = problem()[0], InputStatistics()
    white.add(torch.eye(48), torch.eye(48))
    scheme = WeightScheme(grid, 16, scale_search="em", sweeps=0)
    q = quantize_gptq(weight, white, scheme)
    nearest = quantize_nearest(weight, scheme)
    assert torch.equal(q.codes, nearest.codes)
    assert torch.equal(q.scales, nearest.scales)


def fitted_group_by_group(weight, q, gram, importance, outliers):
    """-> the points [out, groups, 4] of weights made up for what q's earlier groups missed, by the normal equations."""
    missed, width = weight.double() - q.dequantize().double(), weight.shape[1]
    ordinary = [col for col in range(width) if col not in outliers]
    found = []
    for start in range(0, width, q.group_size):
        done = [col for col in ordinary if col < start]
        ahead = [col for col in range(width) if col not in done]
        work = weight.double()
        work[:, ahead] += missed[:, done] @ gram[done][:, ahead] @ torch.linalg.inv(gram[ahead][:, ahead])
        cols = [col for col in ordinary if start <= col < start + q.group_size]
        found.append(fit_centroids(work[:, None, cols], None if importance is None else importance[cols], 4))
    return torch.cat(found, 1)


@pytest.mark.parametrize("outliers", [(), (3, 17, 18, 47)])
@pytest.mark.parametrize("search", SEARCHES)
def test_points_are_fitted_to_the_compensated_weights_by_the_importance_of_the_damped_hessian(search, outliers):
    weight, _, s = problem()
    gram = s.gram.double() + 0.2 * s.gram.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    importance = {
        "em": None,
        "em_diagonal": gram.diagonal(),
        "em_inverse": 1 / torch.linalg.inv(gram).diagonal().square(),
    }[search]
    scheme = WeightScheme("free2", 16, scale_search=search, sweeps=0)  # sweeps would refit the points
    columns = torch.tensor(outliers, dtype=torch.int32) if outliers else None
    q = quantize_gptq(weight, s, scheme, outlier_columns=columns, share=0, damp=0.2)
    expected = fitted_group_by_group(weight, q, gram, importance, outliers)
    torch.testing.assert_close(q.scales.float(), expected, rtol=1e-3, atol=1e-4)


def test_important_columns_are_rounded_better_where_the_points_know_it():
    weight, inputs, s = problem(loud=(3, 20))
    alone = {search: quantize_gptq(weight, s, WeightScheme("free2", None, "nearest", search)) for search in SEARCHES}
    assert loss(weight, alone["em_diagonal"], inputs) < 0.8 * loss(weight, alone["em"], inputs)


@pytest.mark.parametrize("scheme", [WeightScheme("int2", 16), WeightScheme("free2", 16, scale_search="em_diagonal")])
def test_outliers_come_last_and_stay_in_eight_bits(scheme):
    loud = [3, 17, 18, 47]
    weight, inputs, s = problem(loud=loud)
    columns = torch.tensor(loud, dtype=torch.int32)
    without, q = gptq(weight, s, scheme), gptq(weight, s, scheme, outlier_columns=columns)
    assert q.outliers is not None
    assert torch.equal(q.outliers.columns, columns)
    assert not q.codes[:, columns.long()].any()
    assert q.group_size == 16
    values = q.dequantize()
    assert torch.equal(values[:, loud], q.outliers.dequantize())
    # Rounded after all others they make up for their errors: most are not what their weights round to.
    step = q.outliers.scales.float()
    assert ((values[:, loud] - weight[:, loud]).abs() > 0.6 * step).float().mean() > 0.5
    assert loss(weight, q, inputs) < 0.6 * loss(weight, without, inputs)


def test_a_group_may_be_all_outliers():
    weight, inputs, s = problem()
    columns = torch.arange(16, 32, dtype=torch.int32)
    for scheme in (WeightScheme("uint2", 16), WeightScheme("mirror2", 16, scale_search="em_diagonal")):
        q = gptq(weight, s, scheme, outlier_columns=columns)
        assert q.dequantize().isfinite().all()
        assert loss(weight, q, inputs) < loss(weight, gptq(weight, s, scheme), inputs)


def test_the_same_again():
    weight, _, s = problem()
    scheme = WeightScheme("free2", 16, scale_search="em_inverse")
    a, b = (gptq(weight, s, scheme, outlier_columns=torch.tensor([1, 5], dtype=torch.int32)) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


def test_bad_input_is_named():
    weight, _, s = problem()
    with pytest.raises(PaleyError, match=r"layer 7: dimension 48 is no multiple of group_size=32"):
        gptq(weight, s, WeightScheme("free2", 32, scale_search="em"), where="layer 7")
    weight[3, 4] = torch.nan
    with pytest.raises(PaleyError, match=r"layer 7.*NaN"):
        gptq(weight, s, WeightScheme("free2", 16, scale_search="em"), where="layer 7")


def test_scales_of_a_group_are_those_of_its_own_columns():
    """Outliers leave holes in their groups, which no scale may mind."""
    weight, _, s = problem(n=32)
    columns = torch.arange(16, 30, dtype=torch.int32)
    scheme = WeightScheme("gauss2", 16, "nearest", "rms")
    q = quantize_gptq(weight, s, scheme, outlier_columns=columns)
    alone = quantize_nearest(weight[:, 30:], WeightScheme("gauss2", None, "nearest", "rms"))
    assert torch.equal(q.scales[:, 1:], alone.scales)
    assert torch.equal(q.codes[:, 30:], alone.codes)
    assert torch.equal(q.codes[:, :16], quantize_nearest(weight, scheme).codes[:, :16])
