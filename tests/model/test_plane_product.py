"""What a layer keeps for kernels is made anew where a stored tensor has changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paley import kernels
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.methods.gptq import InputStatistics, quantize_gptq
from paley.model.linear import QuantLinear

pytestmark = pytest.mark.skipif(kernels.backend() != "native", reason="native kernels are not built, or off")

CHANGES = {
    "codes": lambda codes: ~codes,
    "scales": lambda scales: scales / 2,
    "outliers": lambda codes: codes.flip(0),
    "outlier_scales": lambda scales: scales * 3,
    "outlier_columns": lambda columns: columns + 1,
}


@pytest.fixture(scope="module")
def made():
    """A layer that runs on bit planes, with outliers, and an input for it."""
    torch.manual_seed(0)
    source, x, statistics = nn.Linear(96, 23), torch.randn(14, 96), InputStatistics()
    statistics.add(x, x)
    scheme, columns = WeightScheme("free2", 32, scale_search="em"), torch.tensor([4, 40], dtype=torch.int32)
    slot = LinearScheme(scheme, ActivationScheme("uint4", group_size=32), outliers=2)
    q = quantize_gptq(source.weight.detach(), statistics, scheme, outlier_columns=columns)
    return QuantLinear.from_linear(source, slot, q), x


@torch.no_grad()
def by_floats(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    fresh = QuantLinear(layer.in_features, layer.out_features, bias=True, slot=layer.slot)
    fresh.load_state_dict(layer.state_dict())
    fresh.materialize_()
    return fresh(x)


@torch.no_grad()
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("part", CHANGES)
def test_a_changed_tensor_changes_the_product(made, part, anew):
    """Written to in place, or another tensor in its place that was written to as often."""
    layer, x = copy.deepcopy(made[0]), made[1]
    changed = CHANGES[part](getattr(layer, part))
    setattr(layer, part, getattr(layer, part).clone())
    before, kept = layer(x), layer._planes
    assert kept is not None
    assert torch.equal(layer(x), before)
    assert layer._planes is kept  # nothing has changed: nothing is made anew
    if anew:
        setattr(layer, part, changed)
    else:
        getattr(layer, part).copy_(changed)
    after = layer(x)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after, by_floats(layer, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_changed_tensor_changes_a_part_of_the_product_only(made):
    layer, x = copy.deepcopy(made[0]), made[1]
    before = layer(x)
    layer.scales[5] /= 2
    same = (layer(x) == before).all(0)
    assert same.sum() == 22
    assert not same[5]


def test_new_codes_are_multiplied_also_in_inference_mode(made):
    with torch.inference_mode():
        layer = QuantLinear.from_linear(nn.Linear(96, 23), made[0].slot, made[0].quantized())
        layer(made[1])
        halved = made[0].quantized()
        layer.set_quantized_(replace(halved, scales=halved.scales / 2))
        torch.testing.assert_close(layer(made[1]), by_floats(layer, made[1]), rtol=1e-4, atol=1e-5)
