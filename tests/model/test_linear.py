import pytest
import torch
from torch import nn

from paley.core import rounding
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.gptq import quantize_gptq
from paley.methods.statistics import InputStatistics
from paley.model.linear import QuantLinear
from paley.ops.inputs import SharedInput, round_input
from paley.ops.matmul import Dense, Packed


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
    scheme = LinearScheme(WeightScheme(f"uint{bits}", 4))
    layer = QuantLinear(in_features, 3, bias=True, scheme=scheme, dtype=torch.bfloat16)
    stored = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}
    assert stored == {
        "codes": ((3, -(-in_features * bits // 8)), torch.uint8),
        "scales": ((3, groups), torch.float16),
        "zeros": ((3, groups), torch.uint8),
        "bias": ((3,), torch.bfloat16),
    }
    symmetric = QuantLinear(in_features, 3, bias=False, scheme=LinearScheme(WeightScheme(f"int{bits}")))
    assert set(symmetric.state_dict()) == {"codes", "scales"}


def test_codes_survive_packing():
    source = linear(29, 11)
    q = quantized(source.weight.detach(), "uint3")
    layer = QuantLinear.from_linear(source, LinearScheme(WeightScheme("uint3")), q)
    assert torch.equal(layer.dequantize(), q.dequantize())
    fresh = QuantLinear(29, 11, bias=True, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), q.dequantize())


@torch.no_grad()
def test_a_scheme_of_nothing_is_the_layer_itself():
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
    scheme = LinearScheme(WeightScheme("int4", 8))
    layer = QuantLinear.from_linear(source, scheme, quantized(source.weight, "int4", 8))
    x = rand(3, 16, dtype=torch.bfloat16)
    packed = layer(x)
    layer.prepare_("dense", torch.bfloat16)
    assert isinstance(layer.product, Dense)
    assert torch.equal(layer(x), packed)
    assert set(layer.state_dict()) == {"codes", "scales", "bias"}
    layer.prepare_("packed")
    assert isinstance(layer.product, Packed)
    layer.prepare_("dense")
    other = quantized(-source.weight, "int4", 8)
    layer.set_quantized_(other)
    assert torch.equal(layer.dequantize(), other.dequantize())
    assert torch.equal(layer(x), nn.functional.linear(x, other.dequantize(x.dtype)) + source.bias)


def test_casting_the_module_leaves_scales_alone():
    source = linear(16, 4)
    layer = QuantLinear.from_linear(
        source, LinearScheme(WeightScheme("int4")), quantized(source.weight.detach(), "int4")
    )
    before = layer.scales.clone()
    layer.prepare_("dense")
    layer.to(torch.bfloat16).to(torch.float32)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, before)
    assert layer.bias.dtype == torch.float32
    assert isinstance(layer.product, Dense)
    assert torch.equal(layer.product.weight, layer.dequantize())
    assert layer.bfloat16().product.weight.dtype == torch.bfloat16
    assert layer.to("meta").scales.is_meta


def test_bad_schemes_are_refused_when_made():
    with pytest.raises(PaleyError, match=r"in_features=20 .* group_size=8"):
        QuantLinear(20, 3, bias=False, scheme=LinearScheme(WeightScheme("int4", 8)))
    with pytest.raises(PaleyError, match=r"input: dimension 20 is no multiple of group_size=8"):
        QuantLinear(20, 3, bias=False, scheme=LinearScheme(input=ActivationScheme("int4", group_size=8)))
    with pytest.raises(PaleyError, match=r"in_features=20, but its transform ends at out_dim=32"):
        QuantLinear(20, 3, bias=False, scheme=LinearScheme(transform=Transform(20, 32, 16)))


def test_bad_codes_are_refused():
    source = linear(16, 4)
    scheme = LinearScheme(WeightScheme("int4", 8))
    good = quantized(source.weight.detach(), "int4", 8)
    with pytest.raises(PaleyError, match="wants codes of 'int4', but none came"):
        QuantLinear.from_linear(source, scheme, None)
    with pytest.raises(PaleyError, match="but codes came"):
        QuantLinear.from_linear(source, LinearScheme(), good)
    with pytest.raises(PaleyError, match=r"codes must have shape \(4, 16\), got \(4, 8\)"):
        QuantLinear.from_linear(source, scheme, Quantized(good.codes[:, :8], good.scales, None, "int4"))
    layer = QuantLinear.from_linear(source, scheme, good)
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
@pytest.mark.parametrize("grid", ["free2", "mirror2", "int2"])
def test_outliers_survive_packing_and_casting(grid):
    source, statistics = linear(32, 6), InputStatistics()
    x = rand(200, 32)
    statistics.add(x, x)
    weight = WeightScheme("int4", 16).on_grid(grid)
    q = quantize_gptq(source.weight, statistics, weight, outlier_columns=torch.tensor([4, 9], dtype=torch.int32))
    scheme = LinearScheme(weight, outliers=2)
    layer = QuantLinear.from_linear(source, scheme, q)
    assert torch.equal(layer.dequantize(), q.dequantize())
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), q.dequantize())
    fresh = QuantLinear(32, 6, bias=True, scheme=scheme)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), q.dequantize())
    torch.testing.assert_close(fresh(x), x @ q.dequantize().T + layer.bias.float())


def test_codes_with_other_outliers_than_the_scheme_are_refused():
    source, statistics = linear(96, 23), InputStatistics()
    x = rand(40, 96)
    statistics.add(x, x)
    weight, made = WeightScheme("free2", 32, scale_search="em"), {}
    for columns in ([], [4, 40]):
        apart = torch.tensor(columns, dtype=torch.int32) if columns else None
        q = quantize_gptq(source.weight.detach(), statistics, weight, outlier_columns=apart)
        made[len(columns)] = QuantLinear.from_linear(source, LinearScheme(weight, outliers=len(columns)), q), q
    for count, other in ((2, 0), (0, 2)):
        with pytest.raises(PaleyError, match=f"the scheme wants {count} outlier columns"):
            made[count][0].set_quantized_(made[other][1])


@torch.no_grad()
def test_a_layer_hands_its_rounded_input_on_unless_it_has_outliers():
    x, scheme = rand(3, 8), LinearScheme(input=ActivationScheme("int2"))
    layers = [QuantLinear.from_linear(linear(8, 4), scheme, None) for _ in range(2)]
    shared = SharedInput(2)
    for layer in layers:
        layer.shared_input = shared
    rounded = rounding.round_trip(x, scheme.input)
    for layer in layers:
        assert torch.equal(layer(x), nn.functional.linear(rounded, layer.weight) + layer.bias)
    layers[1].outlier_columns = torch.tensor([1], dtype=torch.int32)
    apart = round_input(x, scheme, layers[1].outlier_columns)
    assert not torch.equal(apart, rounded)
    for layer, read in zip(layers, (rounded, apart), strict=True):
        assert torch.equal(layer(x), nn.functional.linear(read, layer.weight) + layer.bias)
