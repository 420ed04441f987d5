"""What rounding loses is measured on what a model really caches and reads, as it is rounded afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, Schemes, WeightScheme
from paley.core.transforms import Transform
from paley.model.activation_errors import measure_errors
from paley.model.adapter import Adapter, Block
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.linear import QuantLinear
from paley.model.wrapping import set_attention_, wrap_
from paley.ops.inputs import round_input

IDS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
ATTENTION, DOWN = "model.layers.1.self_attn", "model.layers.1.mlp.down_proj"


def adapter(bias: float = 3.0) -> Adapter:
    """A model whose keys have a large mean."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    made = Adapter(Qwen2ForCausalLM(config).eval())
    for block in made.blocks:
        keys_of(made, block).bias.data.normal_().mul_(bias)
    return made


def keys_of(made: Adapter, block: Block) -> torch.nn.Module:
    """The linear that makes a block's keys."""
    return made.module(next(site.module for site in block.linears() if site.name.endswith("k_proj")))


def wrapped(
    attention: AttentionScheme, linear: LinearScheme | None = None, bias: float = 3.0
) -> tuple[Adapter, Schemes]:
    made = adapter(bias)
    of = {DOWN: linear or LinearScheme()}
    linears = {site.name: of.get(site.name, LinearScheme()) for site in made.sites.weights}
    schemes = Schemes(linears, {block.attention: attention for block in made.blocks})
    wrap_(made, schemes)
    return made, schemes


@pytest.mark.parametrize("transform", [None, Transform(16, 16, 16, 3)])
@pytest.mark.parametrize("what", ["keys", "values"])
@torch.no_grad()
def test_it_is_the_error_of_the_packed_cache(what, transform):
    scheme = ActivationScheme("uint4", clip_ratio=0.9)
    made, schemes = wrapped(AttentionScheme(scheme, scheme, transform))
    found = measure_errors(made, IDS, schemes, {(ATTENTION, what): [scheme]})
    read = {}
    for attention in (AttentionScheme(), schemes.attentions[ATTENTION]):
        set_attention_(made, made.blocks[1], attention)  # the block before it stays exact
        cache = PackedKVCache(made.model)
        made.model(IDS, use_cache=True, **cache_argument(made.model, cache))
        side = getattr(cache.layers[1], f"_{what}").read()
        read[attention] = side if isinstance(side, torch.Tensor) else side.dequantize()
    exact, rounded = read.values()
    exact = transform.apply(exact) if transform and what == "keys" else exact
    expected = ((rounded - exact).double().square().sum(-1) / exact.double().square().sum(-1)).mean()
    assert found((ATTENTION, what), scheme, 16) == pytest.approx(float(expected), rel=1e-5)


def test_centred_keys_lose_less_of_the_same_energy():
    scheme = ActivationScheme("uint4")
    lost = {}
    for center in (False, True):
        made, schemes = wrapped(AttentionScheme(scheme, None, center_keys=center), bias=0.0)
        for block in made.blocks:
            keys_of(made, block).bias.data[:] = torch.tensor([0.0] * 15 + [9.0]).repeat(2)  # RoPE hardly turns it
        place = ATTENTION, "keys"
        lost[center] = measure_errors(made, IDS, schemes, {place: [scheme]})(place, scheme, 16)
    assert lost[True] < lost[False] / 3


@pytest.mark.parametrize("outliers", [0, 4])
@torch.no_grad()
def test_inputs_are_those_that_a_linear_rounds(outliers):
    scheme = ActivationScheme("gauss4", scale="rms")
    transform = None if outliers else Transform(96, 96, 96, 1)
    weight = WeightScheme("int4", method="nearest", scale_search="absmax")
    linear = LinearScheme(weight, scheme, transform, outliers)
    made, schemes = wrapped(AttentionScheme(), linear)
    found = measure_errors(made, IDS, schemes, {(DOWN, "input"): [scheme]})
    seen = []
    down = made.model.get_submodule(DOWN)
    assert isinstance(down, QuantLinear)
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    made.model(IDS)
    exact = transform.apply(seen[0]) if transform else seen[0]
    columns = exact.square().sum(0).topk(outliers).indices
    rounded = round_input(seen[0], linear, columns if outliers else None)
    off, rest = (rounded - exact).double(), torch.ones(96).index_fill(0, columns, 0.0)
    expected = ((off * rest).square().sum(-1) / seen[0].double().square().sum(-1)).mean()
    assert found((DOWN, "input"), scheme, 96) == pytest.approx(float(expected), rel=1e-4)


def test_one_huge_vector_does_not_outshout_the_others():
    """Slopes' noise is as large as each vector; so a token that is a thousand times as loud counts as any other."""
    made, schemes = wrapped(AttentionScheme(), LinearScheme(input=ActivationScheme("int4")))
    scheme, loud = ActivationScheme("int4"), [1.0]
    down = made.model.get_submodule(DOWN)

    def amplify(module, args):
        x = args[0].clone()
        x[:, 0] *= loud[0]
        return (x,)

    down.register_forward_pre_hook(amplify, prepend=True)
    found = []
    for loud[0] in (1.0, 1024.0):  # a power of two changes no digit
        found.append(measure_errors(made, IDS, schemes, {(DOWN, "input"): [scheme]}))
    plain, amplified = (f((DOWN, "input"), scheme, 96) for f in found)
    assert amplified == pytest.approx(plain, rel=1e-6)
