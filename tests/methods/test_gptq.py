import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.schemes import WeightScheme
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.methods.statistics import InputStatistics

GRIDS = ["int3", "uint3", "odd3", "gauss3", "int2", "gauss4", "int8"]
VECTORS = ["p2n64", "p3n64", "p2n16"]


def problem(seed=0, out=24, n=32, tokens=400, noise=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5
    reference = torch.randn(tokens, n, generator=g) @ mix
    inputs = reference + noise * torch.randn(tokens, n, generator=g)
    return torch.randn(out, n, generator=g), inputs, reference


def statistics(inputs, reference):
    s = InputStatistics()
    for x, r in zip(inputs.split(100), reference.split(100), strict=True):
        s.add(x, r)
    return s


def loss(weight, q, inputs, reference):
    return float((reference @ weight.T - inputs @ q.dequantize().T).square().sum())


def scheme_of(grid, group_size=None, sweeps=4):
    return WeightScheme(grid, group_size, scale_search="rms" if grid in VECTORS else "mse", sweeps=sweeps)


@pytest.mark.parametrize("grid", GRIDS + VECTORS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_output_error_is_below_nearest(grid, group_size):
    weight, inputs, reference = problem()
    scheme = scheme_of(grid, group_size)
    nearest = loss(weight, quantize_nearest(weight, scheme), inputs, reference)
    gptq = loss(weight, quantize_gptq(weight, statistics(inputs, reference), scheme), inputs, reference)
    assert gptq < 0.8 * nearest


@pytest.mark.parametrize("grid", GRIDS + VECTORS)
def test_white_inputs_give_the_nearest_codes(grid):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    white = InputStatistics()
    white.add(torch.eye(16) * 10, torch.eye(16) * 10)
    scheme = scheme_of(grid, sweeps=0)
    q = quantize_gptq(weight, white, scheme)
    assert torch.equal(q.codes, quantize_nearest(weight, scheme).codes)


@pytest.mark.parametrize("grid", ["int3", *VECTORS])
def test_each_sweep_lowers_the_error(grid):
    weight, inputs, reference = problem(noise=0.3)
    s = statistics(inputs, reference)
    losses = [
        loss(weight, quantize_gptq(weight, s, scheme_of(grid, sweeps=k), damp=1e-6), inputs, reference)
        for k in range(5)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]


def test_compensation_aims_at_the_original_outputs():
    weight, inputs, reference = problem(noise=0.5)
    s, scheme = statistics(inputs, reference), WeightScheme("int4")
    plain = loss(weight, quantize_gptq(weight, s, scheme, share=0), inputs, reference)
    aware = loss(weight, quantize_gptq(weight, s, scheme), inputs, reference)
    assert aware < 0.9 * plain


def test_a_share_goes_that_far_to_the_target():
    weight, inputs, reference = problem(noise=0.5)
    s = statistics(inputs, reference)
    whole = s.target(weight, 0.01) - weight
    assert float(whole.norm()) > 0.1 * float(weight.norm())
    for share in (0.0, 0.25, 1.0):
        torch.testing.assert_close(s.target(weight, 0.01, share), weight + share * whole)


def test_lag_is_made_up_for():
    weight, inputs, reference = problem()
    mix = torch.randn(24, 32, generator=torch.Generator().manual_seed(5)) * 0.3
    lag = inputs @ mix.T  # what the stream lacks is a function of the inputs: all of it can be made up for
    s = InputStatistics()
    s.add(inputs, outputs=reference @ weight.T + lag)
    q = quantize_gptq(weight, s, WeightScheme("int8"))
    blind = quantize_gptq(weight, statistics(inputs, reference), WeightScheme("int8"))
    assert loss(weight + mix, q, inputs, reference) < 0.01 * loss(weight + mix, blind, inputs, reference)


def test_weights_on_the_grid_are_kept():
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 4, (6, 16), generator=g).float() * 0.5
    weight[:, 0] = 1.5  # max|w| = 3 steps or 4: absmax must meet the grid
    weight.clamp_(-1.5, 1.5)
    scheme = WeightScheme("int3", scale_search="absmax")
    _, inputs, _ = problem(n=16)
    for q in (quantize_nearest(weight, scheme), quantize_gptq(weight, statistics(inputs, inputs), scheme)):
        assert torch.equal(q.dequantize(), weight)


def test_dead_inputs_and_zero_rows():
    weight, inputs, reference = problem()
    inputs[:, 5], reference[:, 5] = 0, 0
    weight[3] = 0
    q = quantize_gptq(weight, statistics(inputs, reference), WeightScheme("int3"))
    assert q.dequantize().isfinite().all()
    assert (q.dequantize()[3] == 0).all()


def test_fewer_tokens_than_columns_need_no_more_damping(caplog):
    weight, inputs, reference = problem(tokens=8)
    s = statistics(inputs, reference)
    assert int(torch.linalg.matrix_rank(s.gram)) == 8 < 32
    q = quantize_gptq(weight, s, WeightScheme("int4"))
    assert loss(weight, q, inputs, reference) < loss(
        weight, quantize_nearest(weight, WeightScheme("int4")), inputs, reference
    )
    assert not caplog.records


@pytest.mark.parametrize("width", [1, 2, 3, 191, 193, 401])
def test_the_spread_is_a_root_of_the_inverse(width):
    """By halves of any size, in the memory of the matrix itself."""
    s = InputStatistics()
    s.add(torch.randn(width + 20, width, generator=torch.Generator().manual_seed(0)))
    metric = s.metric(0.01)
    spread = metric.spread.double()
    assert torch.equal(spread, spread.triu())
    assert torch.equal(s.gram, s.gram.T)
    assert torch.allclose(spread.T @ spread @ metric.gram.double(), torch.eye(width).double(), atol=1e-5)


def test_damping_is_raised_until_the_hessian_is_positive_definite(caplog):
    """By what a planted negative eigenvalue needs, and by no more than the next step; the same in any order."""
    weight, inputs, reference = problem()
    s = statistics(inputs, reference)
    values, vectors = torch.linalg.eigh(s.gram.double())
    values[0] = -0.05 * values.mean()
    s._gram = (vectors * values @ vectors.T).float()
    metric = s.metric(0.01)
    assert metric.raised == 0.1
    mean = float((s.gram.diagonal().double() * 1.01).mean())
    assert torch.allclose(
        metric.gram.diagonal(), s.gram.diagonal() + 0.01 * s.gram.diagonal().mean() + 0.1 * mean, rtol=1e-6
    )
    assert torch.allclose(metric.spread.T @ metric.spread @ metric.gram, torch.eye(32), atol=1e-3)
    order = torch.arange(32).flip(0)
    assert torch.allclose(metric.ordered(order).gram, metric.gram[order][:, order])
    assert metric.ordered(order).raised == 0
    q = quantize_gptq(weight, s, WeightScheme("int4"), where="model.layers.7.mlp.up_proj")
    assert q.dequantize().isfinite().all()
    (record,) = caplog.records
    assert record.getMessage() == (
        "model.layers.7.mlp.up_proj: the Hessian is not positive definite; "
        "damping raised from 0.01 to 0.11 of its mean diagonal"
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda gram: gram.fill_diagonal_(1.0).add_(50 * torch.eye(32).flip(0)), "not positive definite, even with 1 "),
        (lambda gram: gram[2:3].fill_(torch.nan), "NaN or infinite on the calibration text"),
    ],
)
def test_a_hopeless_hessian_is_refused_with_its_layer(spoil, said):
    weight, inputs, reference = problem()
    s = statistics(inputs, reference)
    spoil(s._gram)
    with pytest.raises(PaleyError, match=f"model.layers.7.mlp.up_proj: gptq: .*{said}"):
        quantize_gptq(weight, s, WeightScheme("int4"), where="model.layers.7.mlp.up_proj")


def test_nearest_with_outliers_needs_no_factor_of_the_hessian(monkeypatch):
    """Of a dead layer's inputs there is none, and rounding to nearest has no use for it."""
    monkeypatch.setattr("paley.methods.statistics._factored", None)
    s = statistics(torch.zeros(8, 32), torch.zeros(8, 32))
    q = quantize_gptq(
        torch.randn(4, 32), s, WeightScheme("int4", method="nearest"), outlier_columns=torch.tensor([3, 9]).int()
    )
    assert q.dequantize().isfinite().all()


@pytest.mark.parametrize(("tokens", "damping"), [(16, 1.0), (64, 0.5), (320, 0.1), (32_000, 0.01)])
def test_few_tokens_are_trusted_less(tokens, damping):
    s = InputStatistics()
    for x in torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)).split(7):
        s.add(x)
    assert s.damping == pytest.approx(damping)


@pytest.mark.parametrize("tokens", [64, 128, 512])
def test_damping_by_tokens_loses_less_on_other_text(tokens):
    """Inputs of a power law, turned, as rotated layers read them."""
    lost = {"by tokens": 0.0, "always": 0.0}
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        sizes = torch.arange(1, 97) ** -0.7
        turn = torch.linalg.qr(torch.randn(96, 96, generator=g))[0]
        noise = 0.02 * torch.randn(tokens + 2000, 96, generator=g)
        x = torch.randn(tokens + 2000, 96, generator=g) * sizes @ turn + noise
        weight, s, other = torch.randn(24, 96, generator=g), InputStatistics(), x[tokens:]
        s.add(x[:tokens])
        for name, damp in (("by tokens", s.damping), ("always", 0.01)):
            lost[name] += loss(weight, quantize_gptq(weight, s, scheme_of("p2n64"), damp=damp), other, other)
    assert lost["by tokens"] < 0.96 * lost["always"]


@pytest.mark.parametrize(("grid", "rule"), [("uint3", "mse"), ("uint4", "signed"), ("int3", "mse")])
def test_scales_for_the_inputs_lose_less_where_some_are_loud(grid, rule):
    weight, inputs, _ = problem()
    inputs = inputs * torch.tensor([8.0, 1, 1, 1]).repeat(8)
    s = statistics(inputs, inputs)
    lost = {
        search: loss(weight, quantize_gptq(weight, s, WeightScheme(grid, 16, "gptq", search, sweeps=0)), inputs, inputs)
        for search in (rule, f"{rule}_diagonal")
    }
    assert lost[f"{rule}_diagonal"] < 0.9 * lost[rule]
    assert not WeightScheme(grid, 16, "nearest", f"{rule}_diagonal").needs_data


def test_scales_are_of_finite_weights_and_inputs():
    weight, inputs, _ = problem()
    scheme, damaged = WeightScheme("uint4", 16, "gptq", "mse_diagonal"), weight.clone()
    damaged[2, 5] = torch.nan
    with pytest.raises(PaleyError, match="layer 3: 1 of 768 values are NaN or infinite; repair the checkpoint"):
        quantize_nearest(damaged, scheme, "layer 3")
    inputs[3, 4] = torch.nan
    with pytest.raises(PaleyError, match="layer 3"):
        quantize_gptq(weight, statistics(inputs, inputs), scheme, where="layer 3")
