"""Each product equals its meaning, `grid_matmul`, and what it made ready follows the layer."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paley import kernels
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.gptq import quantize_gptq
from paley.methods.statistics import InputStatistics
from paley.model.linear import QuantLinear
from paley.ops.matmul import CALIBRATION, PRODUCTS, Integer, Packed, Planes, bfloat16_linear, choose, grid_matmul

WIDE = Transform(90, 96, 12, seed=5)
COLUMNS = torch.tensor([4, 40], dtype=torch.int32)
CPU = torch.device("cpu")

native = pytest.mark.skipif(kernels.backend() != "native", reason="native kernels are not built, or off")


def layer_of(
    grid="free2", inputs="uint4", transform=None, outliers=None, group_size=32, bias=True
) -> tuple[QuantLinear, torch.Tensor]:
    """A layer of 96 stored columns and 23 rows, and an input for it. As it is by default, it can run on bit planes."""
    torch.manual_seed(0)
    source, x, statistics = nn.Linear(96, 23, bias=bias), torch.randn(2, 7, 90 if transform else 96), InputStatistics()
    seen = x.flatten(0, 1) if transform is None else transform.apply(x.flatten(0, 1))
    statistics.add(seen, seen)
    weight = WeightScheme("int4", group_size).on_grid(grid)
    q = quantize_gptq(source.weight.detach(), statistics, weight, outlier_columns=outliers)
    rounded = None if inputs is None else ActivationScheme(inputs, group_size=group_size)
    scheme = LinearScheme(weight, rounded, transform, 0 if outliers is None else len(outliers))
    return QuantLinear.from_linear(source, scheme, q), x


def meaning(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    y = grid_matmul(x, layer)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    ("grid", "inputs"), [("free2", "uint4"), ("mirror2", "uint4"), ("int3", "uint4"), ("uint4", None), ("free2", None)]
)
@pytest.mark.parametrize("outliers", [None, COLUMNS])
@pytest.mark.parametrize("transform", [None, WIDE])
@torch.no_grad()
def test_each_product_equals_its_meaning(name, grid, inputs, outliers, transform):
    layer, x = layer_of(grid, inputs, transform, outliers)
    if not PRODUCTS[name].takes(layer.scheme, 96, CPU):
        with pytest.raises(PaleyError, match=f"product '{name}' does not take .*; use product='auto'"):
            layer.prepare_(name)
        return
    layer.prepare_(name)
    assert type(layer.product) is PRODUCTS[name]
    for some in (x, x[:1, :1], x[0, 0], x[:0]):
        y = layer(some)
        assert y.shape == (*some.shape[:-1], 23)
        if name == "integer":  # weights here are off by 10 % and more
            assert float((y - meaning(layer, some)).norm()) <= 0.01 * float(meaning(layer, some).norm())
        else:
            torch.testing.assert_close(y, meaning(layer, some), rtol=1e-5, atol=1e-5)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, meaning(layer, x.bfloat16()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_reach_the_input(name):
    layer, x = layer_of()
    if not PRODUCTS[name].takes(layer.scheme, 96, CPU):
        pytest.skip("native kernels are not built, or off")
    layer.prepare_(name)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, meaning(layer, x))
    assert y.requires_grad


MISFITS = [
    lambda s: replace(s, input=replace(s.input, refit=True)),
    lambda s: replace(s, input=replace(s.input, group_size=16)),
    lambda s: replace(s, input=replace(s.input, grid="uint3")),
    lambda s: replace(s, input=replace(s.input, grid="int4")),
    lambda s: replace(s, input=None),
    lambda s: replace(s, weight=s.weight.on_grid("free3")),
    lambda s: replace(s, weight=s.weight.on_grid("int2")),
    lambda s: replace(s, weight=replace(s.weight, group_size=24), input=replace(s.input, group_size=24)),
    lambda s: replace(s, weight=None),
]


@native
def test_planes_are_chosen_for_what_kernels_take_and_for_nothing_else(monkeypatch):
    layer, _ = layer_of()
    assert Planes.takes(layer.scheme, 96, CPU)
    assert isinstance(choose(layer, 96, CPU, torch.float32), Planes)
    whole = replace(layer.scheme, weight=replace(layer.scheme.weight, group_size=None))
    assert Planes.takes(replace(whole, input=replace(whole.input, group_size=None)), 96, CPU)
    assert not Planes.takes(layer.scheme, 96, torch.device("cuda"))
    for misfit in MISFITS:
        assert not Planes.takes(misfit(layer.scheme), 96, CPU)
    other, _ = layer_of("int3")
    assert isinstance(choose(other, 96, CPU, torch.float32), Integer)
    monkeypatch.setattr(kernels, "planes_fit", lambda group_size: False)
    assert isinstance(choose(layer, 96, CPU, torch.float32), Integer)


@torch.no_grad()
def test_a_weight_that_is_kept_is_multiplied_as_it_is():
    source, x = nn.Linear(12, 5), torch.randn(4, 12)
    layer = QuantLinear.from_linear(source, LinearScheme(), None)
    for name in ("auto", *PRODUCTS):
        layer.prepare_(name)
        assert isinstance(layer.product, Packed)
        assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("kept", [False, True])
def test_an_unknown_product_is_refused(kept):
    layer = QuantLinear(8, 4, bias=False, scheme=LinearScheme()) if kept else layer_of()[0]
    with pytest.raises(
        PaleyError, match="'plane' is none of auto, planes, integer, triton, dense, packed; did you mean 'planes'"
    ):
        layer.prepare_("plane")


@torch.no_grad()
def test_a_transform_goes_into_a_dense_weight_if_nothing_is_rounded_after_it(monkeypatch):
    layer, x = layer_of("int3", None, WIDE)
    want = meaning(layer, x)
    layer.prepare_("dense")
    assert layer.product.weight.shape == (23, 90)
    monkeypatch.setattr(Transform, "apply", lambda *_: pytest.fail("the input is transformed"))
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_dense_weight_follows_the_rounding_of_its_input():
    """The transform goes out of the weight if the input is rounded, and back in if it no longer is."""
    layer, x = layer_of("int3", None, WIDE)
    layer.prepare_("dense")
    for scheme, columns in ((ActivationScheme("uint4"), 96), (ActivationScheme("int2"), 96), (None, 90)):
        layer.set_input_(scheme)
        assert layer.product.weight.shape == (23, columns)
        torch.testing.assert_close(layer(x), meaning(layer, x), rtol=1e-5, atol=1e-5)


@native
@torch.no_grad()
def test_another_scheme_of_the_input_chooses_again():
    layer, x = layer_of()
    layer.prepare_()
    for change, kind in (({"clip_ratio": 0.5}, Planes), ({"refit": True}, Integer)):
        layer.set_input_(replace(layer.scheme.input, **change))
        assert isinstance(layer.product, kind)
        torch.testing.assert_close(layer(x), meaning(layer, x), rtol=0, atol=1e-5 if kind is Planes else 0.02)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("transform", [None, WIDE])
@torch.no_grad()
def test_a_cast_leaves_the_product_right(name, transform):
    layer, x = layer_of(inputs="uint4" if name == "planes" else None, transform=transform)
    if not PRODUCTS[name].takes(layer.scheme, 96, CPU):
        pytest.skip("native kernels are not built, or off")
    layer.prepare_(name)
    want = layer(x)
    layer.to(torch.bfloat16)
    torch.testing.assert_close(layer(x.bfloat16()), meaning(layer, x.bfloat16()), rtol=0.05, atol=0.05)
    layer.to(torch.float32)
    assert type(layer.product) is PRODUCTS[name]
    layer.bias.copy_(layer_of()[0].bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_a_move_leaves_nothing_behind():
    layer, _ = layer_of("int3", None)
    layer.prepare_()
    assert layer.to("meta").product.weight.is_meta


CHANGES = {
    "codes": lambda codes: ~codes,
    "scales": lambda scales: scales / 2,
    "outliers": lambda codes: codes.flip(0),
    "outlier_scales": lambda scales: scales * 3,
    "outlier_columns": lambda columns: columns + 1,
}
NAMES = [pytest.param("planes", marks=native), "dense", "packed"]


@torch.no_grad()
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_tensor_changes_the_product_made_ready_again(name, part, anew):
    """Written to in place, or another tensor in its place."""
    layer, x = layer_of(outliers=COLUMNS)
    layer.prepare_(name)
    before, changed = layer(x), CHANGES[part](getattr(layer, part))
    if anew:
        setattr(layer, part, changed)
    else:
        getattr(layer, part).copy_(changed)
    layer.prepare_(name)
    after = layer(x)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after, meaning(layer, x), rtol=1e-5, atol=1e-5)


@native
@torch.no_grad()
def test_a_changed_tensor_changes_a_part_of_the_product_only():
    layer, x = layer_of(outliers=COLUMNS)
    layer.prepare_("planes")
    before = layer(x)
    layer.scales[5] /= 2
    layer.prepare_("planes")
    same = (layer(x) == before).flatten(0, 1).all(0)
    assert same.sum() == 22
    assert not same[5]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_new_codes_are_multiplied_and_a_copy_has_its_own(name, inference):
    layer, x = layer_of(outliers=COLUMNS)
    halved = layer.quantized()
    with torch.inference_mode(inference), torch.no_grad():
        layer.prepare_(name)
        before, copied = layer(x), copy.deepcopy(layer)
        layer.set_quantized_(replace(halved, scales=halved.scales / 2))
        torch.testing.assert_close(layer(x), meaning(layer, x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(layer(x), before)
        assert torch.equal(copied(x), before)
        copied.set_input_(ActivationScheme("uint4", clip_ratio=0.5, group_size=32))  # which is none of the first's
        torch.testing.assert_close(layer(x), meaning(layer, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copied(x), meaning(copied, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 64), (64,), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fast", [pytest.param(True, marks=native), False])
def test_a_product_in_bfloat16_has_sums_of_float32(shape, bias, fast, monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    x, layer = torch.randn(shape), nn.Linear(64, 40, bias=bias).requires_grad_(False)
    found = bfloat16_linear(x, layer.weight, layer.bias)
    rounded = nn.functional.linear(x.bfloat16().double(), layer.weight.bfloat16().double())
    rounded = rounded if layer.bias is None else rounded + layer.bias.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), rounded if fast else layer.double()(x.double()), atol=1e-5, rtol=1e-5)


@native
def test_a_product_that_wants_gradients_is_not_rounded(monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: True)
    x, weight = torch.randn(5, 64, requires_grad=True), torch.randn(40, 64)
    assert torch.equal(bfloat16_linear(x, weight), nn.functional.linear(x, weight))


def test_an_unquantized_weight_is_not_held_twice():
    layer = QuantLinear.from_linear(nn.Linear(96, 23), LinearScheme(), None)
    layer.prepare_(CALIBRATION)
    assert layer.weight is not None
    assert layer.product.weight.data_ptr() == layer.weight.data_ptr()
    turned = QuantLinear.from_linear(nn.Linear(96, 23), LinearScheme(transform=Transform(96, 96, 12, seed=5)), None)
    turned.prepare_(CALIBRATION)
    x = torch.randn(4, 96)
    torch.testing.assert_close(turned(x), meaning(turned, x), rtol=0.05, atol=0.05)
