import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paley import kernels
from paley.core import rounding
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.gptq import InputStatistics, quantize_gptq
from paley.model.inputs import SharedInput, round_input
from paley.model.linear import QuantLinear
from paley.model.plane_product import runs_on_planes


def quantized(weight: torch.Tensor, grid: str, group_size: int | None = None) -> Quantized:
    return rounding.quantize_dynamic(weight, ActivationScheme(grid, group_size=group_size))


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    made = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        made.weight.copy_(rand(out_features, in_features))
        if bias:
            made.bias.copy_(rand(out_features, seed=1))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("grid", "group_size", "inputs"),
    [
        ("int3", 12, "uint4"),
        ("uint4", None, "int8"),
        ("gauss3", 6, "odd3"),
        ("odd2", None, None),
        ("int8", 4, "gauss4"),
    ],
)
@torch.no_grad()
def test_forward_is_rounded_input_times_dequantized_weight(grid, group_size, inputs, bias):
    source = linear(36, 7, bias=bias)
    q = quantized(source.weight, grid, group_size)
    scheme = ActivationScheme(inputs, clip_ratio=0.9) if inputs else None
    layer = QuantLinear.from_linear(source, LinearScheme(WeightScheme(grid, group_size), scheme), q)
    x = rand(2, 5, 36, seed=2)
    rounded = rounding.round_trip(x, scheme) if scheme else x
    assert torch.equal(layer(x), nn.functional.linear(rounded, q.dequantize(), source.bias))


@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_as_the_checkpoint_says(bits):
    in_features, groups = 20, 5
    slot = LinearScheme(WeightScheme(f"uint{bits}", 4))
    layer = QuantLinear(in_features, 3, bias=True, slot=slot, dtype=torch.bfloat16)
    stored = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}
    assert stored == {
        "codes": ((3, -(-in_features * bits // 8)), torch.uint8),
        "scales": ((3, groups), torch.float16),
        "zeros": ((3, groups), torch.uint8),
        "bias": ((3,), torch.bfloat16),
    }
    symmetric = QuantLinear(in_features, 3, bias=False, slot=LinearScheme(WeightScheme(f"int{bits}")))
    assert set(symmetric.state_dict()) == {"codes", "scales"}


def test_codes_survive_packing():
    source = linear(29, 11)
    q = quantized(source.weight.detach(), "uint3")
    layer = QuantLinear.from_linear(source, LinearScheme(WeightScheme("uint3")), q)
    assert torch.equal(layer.dequantize(), q.dequantize())
    fresh = QuantLinear(29, 11, bias=True, slot=layer.slot)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), q.dequantize())


@torch.no_grad()
def test_a_slot_without_schemes_is_the_layer_itself():
    source = linear(12, 5)
    layer = QuantLinear.from_linear(source, LinearScheme(), None)
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = rand(4, 12)
    assert torch.equal(layer(x), source(x))


@torch.no_grad()
def test_the_transform_widens_the_input_and_cancels():
    source = linear(24, 6).double()
    transform = Transform(24, 32, 16, seed=3)
    folded = nn.Linear(32, 6).double()
    folded.weight.copy_(transform.apply(source.weight))
    folded.bias.copy_(source.bias)
    layer = QuantLinear.from_linear(folded, LinearScheme(transform=transform), None)
    x = rand(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), source(x), rtol=0, atol=1e-12)
    scheme = ActivationScheme("int4")
    layer = QuantLinear.from_linear(folded, LinearScheme(input=scheme, transform=transform), None)
    torch.testing.assert_close(layer(x), folded(rounding.round_trip(transform.apply(x), scheme)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_dense_weight_changes_no_bit_and_is_not_saved():
    source = linear(16, 4).bfloat16()
    slot = LinearScheme(WeightScheme("int4", 8))
    layer = QuantLinear.from_linear(source, slot, quantized(source.weight, "int4", 8))
    x = rand(3, 16, dtype=torch.bfloat16)
    packed = layer(x)
    layer.materialize_(torch.bfloat16)
    assert layer.dense is not None
    assert torch.equal(layer(x), packed)
    assert "dense" not in layer.state_dict()
    layer.release_()
    assert layer.dense is None
    layer.materialize_()
    other = quantized(-source.weight, "int4", 8)
    layer.set_quantized_(other)
    assert torch.equal(layer.dequantize(), other.dequantize())
    assert layer.dense is None


def test_casting_the_module_leaves_scales_alone():
    source = linear(16, 4)
    layer = QuantLinear.from_linear(source, LinearScheme(WeightScheme("int4")), quantized(source.weight.detach(), "int4"))
    before = layer.scales.clone()
    layer.materialize_()
    layer.to(torch.bfloat16).to(torch.float32)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, before)
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.dense, layer.dequantize())
    assert layer.to("meta").scales.is_meta


@torch.no_grad()
def test_a_shared_input_is_rounded_once_and_again_when_it_changes(monkeypatch):
    calls = []
    plain = rounding.round_trip
    monkeypatch.setattr(rounding, "round_trip", lambda x, scheme: calls.append(0) or plain(x, scheme))
    shared, x = SharedInput(), rand(3, 8)
    fine, coarse = ActivationScheme("int8"), ActivationScheme("int2")
    for scheme, rounded in [(fine, 1), (fine, 1), (coarse, 2), (coarse, 2), (fine, 3)]:
        assert torch.equal(shared.once(round_input, x, LinearScheme(input=scheme)), plain(x, scheme))
        assert len(calls) == rounded
    x.mul_(3)
    assert torch.equal(shared.once(round_input, x, LinearScheme(input=fine)), plain(x, fine))
    equal = x.clone()
    shared.once(round_input, equal, LinearScheme(input=fine))
    assert len(calls) == 5
    layers = [QuantLinear.from_linear(linear(8, 4), LinearScheme(input=coarse), None) for _ in range(2)]
    for layer in layers:
        layer.shared_input = shared
        assert torch.equal(layer(x), nn.functional.linear(plain(x, coarse), layer.weight, layer.bias))
    assert len(calls) == 6


def test_bad_slots_are_refused_when_made():
    with pytest.raises(PaleyError, match=r"in_features=20 .* group_size=8"):
        QuantLinear(20, 3, bias=False, slot=LinearScheme(WeightScheme("int4", 8)))
    with pytest.raises(PaleyError, match=r"input: dimension 20 is no multiple of group_size=8"):
        QuantLinear(20, 3, bias=False, slot=LinearScheme(input=ActivationScheme("int4", group_size=8)))
    with pytest.raises(PaleyError, match=r"in_features=20, but its transform ends at out_dim=32"):
        QuantLinear(20, 3, bias=False, slot=LinearScheme(transform=Transform(20, 32, 16)))


def test_bad_codes_are_refused():
    source = linear(16, 4)
    slot = LinearScheme(WeightScheme("int4", 8))
    good = quantized(source.weight.detach(), "int4", 8)
    with pytest.raises(PaleyError, match="wants codes of 'int4', but none came"):
        QuantLinear.from_linear(source, slot, None)
    with pytest.raises(PaleyError, match="but codes came"):
        QuantLinear.from_linear(source, LinearScheme(), good)
    layer = QuantLinear.from_linear(source, slot, good)
    for bad, message in [
        (Quantized(good.codes, good.scales, None, "int3"), "wants codes of 'int4', got 'int3'"),
        (
            Quantized(good.codes[:, :8], good.scales, None, "int4"),
            r"codes must have shape \(4, 16\), got \(4, 8\)",
        ),
        (
            Quantized(good.codes, good.scales[:, :1], None, "int4"),
            r"scales: must have shape \(4, 2\), got \(4, 1\)",
        ),
        (
            Quantized(good.codes, good.scales, good.codes, "int4"),
            "zeros: is there, but the grid",
        ),
        (Quantized(good.codes, good.scales.float() + 1e-5, None, "int4"), "scales are not float16 values"),
    ]:
        with pytest.raises(PaleyError, match=message):
            layer.set_quantized_(bad)
    assert torch.equal(layer.dequantize(), good.dequantize())


@torch.no_grad()
def test_outlier_inputs_are_rounded_by_themselves_and_leave_no_trace_in_the_others():
    x, columns = rand(5, 32), torch.tensor([3, 20], dtype=torch.int32)
    x[:, 3] *= 100
    scheme = ActivationScheme("uint4", group_size=16)
    got = round_input(x, LinearScheme(input=scheme), columns)
    rest = x.clone()
    rest[:, [3, 20]] = 0
    want = rounding.round_trip(rest, scheme)
    want[:, [3, 20]] = rounding.round_trip(x[:, [3, 20]], ActivationScheme("int8"))
    assert torch.equal(got, want)
    assert (got - x).square().mean() < 0.1 * (rounding.round_trip(x, scheme) - x).square().mean()
    assert torch.equal(round_input(x, LinearScheme(), columns), x)


@torch.no_grad()
def test_a_shared_input_minds_the_outlier_columns():
    shared, x, slot = SharedInput(), rand(3, 16), LinearScheme(input=ActivationScheme("int3"))
    for columns in (None, torch.tensor([1]), torch.tensor([1]), torch.tensor([2])):
        assert torch.equal(shared.once(round_input, x, slot, columns), round_input(x, slot, columns))


@torch.no_grad()
@pytest.mark.parametrize("grid", ["free2", "mirror2", "int2"])
def test_outliers_survive_packing_and_casting(grid):
    source, statistics = linear(32, 6), InputStatistics()
    x = rand(200, 32)
    statistics.add(x, x)
    scheme = WeightScheme("int4", 16).on_grid(grid)
    q = quantize_gptq(source.weight, statistics, scheme, outlier_columns=torch.tensor([4, 9], dtype=torch.int32))
    slot = LinearScheme(scheme, outliers=2)
    layer = QuantLinear.from_linear(source, slot, q)
    assert torch.equal(layer.dequantize(), q.dequantize())
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), q.dequantize())
    fresh = QuantLinear(32, 6, bias=True, slot=slot)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), q.dequantize())
    torch.testing.assert_close(fresh(x), x @ q.dequantize().T + layer.bias.float())


def on_planes(outliers=None, grid="free2", transform=None, group_size=32):
    """A layer that can run on bit planes, and an input for it."""
    source, x = linear(96, 23), rand(2, 7, 90 if transform else 96)
    statistics = InputStatistics()
    seen = x.flatten(0, 1) if transform is None else transform.apply(x.flatten(0, 1))
    statistics.add(seen, seen)
    scheme = WeightScheme("int4", group_size).on_grid(grid)
    q = quantize_gptq(source.weight, statistics, scheme, outlier_columns=outliers)
    inputs = ActivationScheme("uint4", group_size=group_size)
    slot = LinearScheme(scheme, inputs, transform, 0 if outliers is None else len(outliers))
    return QuantLinear.from_linear(source, slot, q), x, q


native = pytest.mark.skipif(kernels.backend() != "native", reason="native kernels are not built, or off")


@native
@torch.no_grad()
@pytest.mark.parametrize("grid", ["free2", "mirror2"])
@pytest.mark.parametrize("outliers", [None, torch.tensor([4, 40], dtype=torch.int32)])
@pytest.mark.parametrize("transform", [None, Transform(90, 96, 12, seed=5)])
def test_work_on_bit_planes_equals_work_on_floats(grid, outliers, transform):
    layer, x, _ = on_planes(outliers, grid, transform)
    assert runs_on_planes(layer.slot, 96)
    fast, one = layer(x), layer(x[0, 0])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer._planes is not None
    layer.materialize_()
    assert layer._planes is None
    torch.testing.assert_close(fast, layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, fast[0, 0])


@native
@torch.no_grad()
def test_bit_planes_follow_the_stored_tensors():
    layer, x, q = on_planes(torch.tensor([4, 40], dtype=torch.int32))
    before = layer(x)
    layer.set_quantized_(replace(q, scales=q.scales / 2))
    halved = layer(x)
    for _ in range(20):  # freed memory is soon taken again, at the same place and as new
        layer.scales = q.scales.clone()
        layer.scales = q.scales.clone()
        assert torch.equal(layer(x), before)
        layer.scales = q.scales / 2
        layer.scales = q.scales / 2
        assert torch.equal(layer(x), halved)
    assert torch.equal(copy.deepcopy(layer)(x), halved)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer)(x), halved)


def test_bit_planes_are_for_slots_that_kernels_take():
    slot = on_planes()[0].slot
    assert slot.weight is not None
    assert slot.input is not None
    for other in (
        replace(slot, input=replace(slot.input, refit=True)),
        replace(slot, input=replace(slot.input, group_size=16)),
        replace(slot, input=replace(slot.input, grid="uint3")),
        replace(slot, input=replace(slot.input, grid="int4")),
        replace(slot, input=None),
        replace(slot, weight=slot.weight.on_grid("free3")),
        replace(slot, weight=slot.weight.on_grid("int2")),
        on_planes(group_size=24)[0].slot,
    ):
        assert not runs_on_planes(other, 96)


def test_codes_with_other_outliers_than_the_slot_are_refused():
    layer, _, q = on_planes(torch.tensor([4, 40], dtype=torch.int32))
    with pytest.raises(PaleyError, match="the slot wants 2 outlier columns"):
        layer.set_quantized_(replace(q, outliers=None))
    plain = on_planes()[0]
    with pytest.raises(PaleyError, match="the slot wants 0 outlier columns"):
        plain.set_quantized_(q)
