import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from family_configs import CONFIGS
from paley.core.metrics import kl_divergence
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.methods.statistics import InputStatistics
from paley.methods.tuning import Adam, kl_backward, rate_at
from paley.model.adapter import Adapter
from paley.model.fold import fold_norms_
from paley.model.linear import QuantLinear
from paley.model.tuning import Scaled, Tuner
from paley.ops.inputs import SharedInput

WIDTH, ROWS = 32, 12
TURN = Transform(WIDTH, WIDTH, 16, 3)
SCHEMES = {
    "one scale, turned points": LinearScheme(WeightScheme("p2n256", scale_search="rms"), None, TURN),
    "groups as wide as blocks": LinearScheme(WeightScheme("gauss3", 16, scale_search="rms"), None, TURN),
    "groups within blocks": LinearScheme(WeightScheme("gauss3", 8, scale_search="rms"), None, TURN),
    "zero points": LinearScheme(WeightScheme("uint4", 8, scale_search="mse")),
    "rounded inputs": LinearScheme(WeightScheme("int4"), ActivationScheme("int8"), TURN),
    "outliers": LinearScheme(WeightScheme("int3", 16), ActivationScheme("uint4"), None, outliers=3),
    "free points": LinearScheme(WeightScheme("free2", 16, scale_search="em_diagonal")),
    "mirrored points": LinearScheme(WeightScheme("mirror2", 16, scale_search="em")),
}


@pytest.fixture
def x():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def layer(scheme: LinearScheme) -> QuantLinear:
    torch.manual_seed(0)
    source = nn.Linear(WIDTH, ROWS)
    x, statistics = torch.randn(200, WIDTH), InputStatistics()
    statistics.add(x)
    columns = torch.arange(scheme.outliers, dtype=torch.int32) * 5 if scheme.outliers else None
    assert scheme.weight is not None
    q = quantize_gptq(source.weight.detach(), statistics, scheme.weight, outlier_columns=columns)
    return QuantLinear.from_linear(source, scheme, q)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_multiplies_as_the_layer_does_until_its_scales_move(name, x):
    linear = layer(SCHEMES[name])
    expected = linear(x)
    linear.product = scaled = Scaled(linear, torch.float32)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    scaled.store_()  # what did not move is stored as it was
    assert all(torch.equal(tensor, before[key]) for key, tensor in linear.state_dict().items())


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_small_moves_and_moves_are_stored(name, x):
    linear = layer(SCHEMES[name])
    linear.product = scaled = Scaled(linear, torch.float32)
    weights = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(2))
    (linear(x) * weights).sum().backward()
    slope, start = scaled.scales.grad, scaled.scales.detach().clone()
    assert slope is not None
    way = slope * start.square()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            scaled.scales.copy_(start + sign * 1e-3 * way / way.abs().max() * start.abs().min())
            ends.append((linear(x) * weights).sum().double())
            moved = scaled.scales.detach().clone()
        expected = float(ends[0] - ends[1])
        along = float((slope * (2e-3 * way / way.abs().max() * start.abs().min())).sum())
    assert along == pytest.approx(expected, rel=0.02)
    scaled.store_()
    assert linear.scales is not None
    torch.testing.assert_close(linear.scales.float(), moved, rtol=1e-3, atol=1e-7)


def test_points_that_would_not_ascend_are_left(x):
    linear = layer(SCHEMES["free points"])
    before = linear.scales.clone()
    scaled = Scaled(linear, torch.float32)
    with torch.no_grad():
        scaled.scales[0, 0] = scaled.scales[0, 0].flip(0)
        scaled.scales[1, 1] *= 1.5
    scaled.store_()
    assert torch.equal(linear.scales[0, 0], before[0, 0])
    assert not torch.equal(linear.scales[1, 1], before[1, 1])
    linear.scheme.weight.grid.check_scales(linear.scales, "after")


def test_kl_in_pieces_has_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr("paley.methods.tuning.PIECE", 30)
    torch.manual_seed(0)
    head, other = torch.randn(9, 4), torch.randn(9, 4)
    source, original, scale = (
        torch.randn(7, 4, requires_grad=True),
        torch.randn(7, 4),
        torch.ones(9, requires_grad=True),
    )
    whole = kl_divergence(original @ other.T, (source * 2) @ head.T * scale).mean()
    expected = torch.autograd.grad(whole, (source, scale))
    loss = kl_backward(source * 2, original, lambda h: h @ head.T * scale, lambda h: h @ other.T, 9)
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close((source.grad, scale.grad), expected)


def test_a_step_of_adam_is_the_rate_in_the_units_of_each_value():
    value = torch.tensor([1.0, 100.0, 5.0], requires_grad=True)
    adam = Adam([value], [torch.tensor([1.0, 100.0, 2.0])])
    (value * torch.tensor([3.0, 1e-6, 0.0])).sum().backward()
    adam.step(0.01)
    torch.testing.assert_close(value.detach(), torch.tensor([0.99, 99.0, 5.0]))
    assert value.grad is None


def test_the_rate_rises_and_ends_at_nothing():
    rates = [rate_at(step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.25)
    assert max(rates) == rates[4] or max(rates) == rates[3]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert rate_at(0, 1) == 1.0
    assert not math.isnan(sum(rates))


def test_layers_with_columns_of_their_own_share_no_rounded_input(x):
    scheme, shared = SCHEMES["outliers"], SharedInput(2)
    readers = [layer(scheme), layer(scheme)]
    readers[1].outlier_columns = readers[1].outlier_columns + 7
    expected = [reader(x) for reader in readers]
    for reader in readers:
        reader.shared_input, reader.product = shared, Scaled(reader, torch.float32)
    for reader, alone in zip(readers, expected, strict=True):
        torch.testing.assert_close(reader(x), alone, rtol=1e-5, atol=1e-5)


IDS = torch.randint(4, 60, (24,), generator=torch.Generator().manual_seed(0))


def random_adapter(kind: str) -> Adapter:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](num_key_value_heads=2))
    adapter = Adapter(model)
    ones = "q_norm" if adapter.architecture.gain_offset else "norm"
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.2 if p.dim() > 1 else torch.zeros_like(p) + (ones in name)
    return adapter


def tuner(adapter: Adapter, keep=lambda name, value: value) -> Tuner:
    return Tuner(adapter, dtype=torch.float32, keep=keep, whole=True)


def step(tuning: Tuner, adapter: Adapter) -> None:
    wanted = torch.randn(len(IDS), adapter.sites.head.shape[1], generator=torch.Generator().manual_seed(1))
    tuning.step(IDS, wanted, lambda hidden: hidden @ adapter.embedding.weight.T, 0.01)


def vectors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapter.model.named_parameters() if p.dim() == 1}


def test_gains_beside_an_offset_move_by_the_rate_though_they_are_stored_as_0():
    adapter = random_adapter("gemma3_text")
    with torch.no_grad():
        fold_norms_(adapter)
    before = vectors(adapter)
    with tuner(adapter) as tuning:
        step(tuning, adapter)
    moves = {name: (value - before[name]).abs() for name, value in vectors(adapter).items()}
    own = {name: 2.0 if "q_norm" in name else 1.0 for name in moves}  # of a gain: 1 and what is stored
    assert any(".q_norm." in name for name in own)
    for name, move in moves.items():
        assert float(move.max()) == pytest.approx(0.01 * own[name], rel=1e-3), name


def test_a_bias_of_zeros_moves_by_a_share_of_what_it_is_added_to():
    adapter = random_adapter("qwen2")
    names, seen = [name for name in vectors(adapter) if name.endswith(".bias")], {}

    def note(name: str, made: torch.Tensor) -> None:
        seen.setdefault(name, float(made.detach().square().mean().sqrt()))

    for name in names:
        module = adapter.model.get_submodule(name.removesuffix(".bias"))
        module.register_forward_hook(lambda _, __, made, name=name: note(name, made))
    with tuner(adapter) as tuning:
        step(tuning, adapter)
    after = vectors(adapter)
    assert len(names) == 6
    for name in names:
        assert float(after[name].abs().max()) == pytest.approx(0.01 * 0.01 * seen[name], rel=1e-2), name


@pytest.mark.parametrize("where", ["in the with", "as values are kept"])
def test_if_anything_is_raised_all_values_are_as_they_were(where):
    adapter = random_adapter("qwen2")
    modules = {site.module: adapter.module(site.module) for site in adapter.sites.of("linear")}
    for path, module in modules.items():
        made = layer_of(module)
        adapter.model.set_submodule(path, made)
    state = {key: tensor.clone() for key, tensor in adapter.model.state_dict().items()}
    products = [adapter.module(path).product for path in modules]
    wants = {name: p.requires_grad for name, p in adapter.model.named_parameters()}
    kept = []

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        kept.append(name)
        if len(kept) > 2:
            raise ValueError(where)
        return value.half().float()

    def run() -> None:
        with tuner(adapter, keep) as tuning:
            step(tuning, adapter)
            if where == "in the with":
                raise ValueError(where)

    with pytest.raises(ValueError, match=where):
        run()
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter.model.state_dict().items())
    assert [adapter.module(path).product for path in modules] == products
    assert {name: p.requires_grad for name, p in adapter.model.named_parameters()} == wants


def layer_of(source: nn.Module) -> QuantLinear:
    scheme = WeightScheme("int4", 8, scale_search="mse")
    return QuantLinear.from_linear(source, LinearScheme(scheme), quantize_nearest(source.weight.detach(), scheme))
