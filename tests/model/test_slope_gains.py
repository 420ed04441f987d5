"""Slopes behind a diagonal: the closed form is what noise does; behind feedback, what rounding with it loses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.diagonal import balance, strength_for
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.methods.statistics import InputStatistics
from paley.model.adapter import Adapter
from paley.model.replay import runner_of
from paley.model.slope_gains import slope_gains

IDS = torch.arange(120).view(3, 40) % 50
BLOCK = "model.layers.0."


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # columns and channels of very different sizes
            module.weight.data *= torch.randn(module.in_features).exp()
    model.get_parameter(BLOCK + "mlp.up_proj.weight").data *= torch.randn(64, 1).exp()
    return model


def inputs_of(model: LlamaForCausalLM, path: str, ids: torch.Tensor = IDS) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("path", ["mlp.down_proj", "self_attn.o_proj"])
def test_gains_are_those_of_noise(model, path):
    linear = model.get_submodule(BLOCK + path)
    width = linear.in_features
    scheme = LinearScheme(transform=Transform(width, width, width, 1), diagonal=True)
    gains = slope_gains(runner_of(Adapter(model)), IDS, {BLOCK + path: scheme})
    x = inputs_of(model, BLOCK + path)
    weight = linear.weight.detach().double()
    weight = weight / weight.norm(dim=1, keepdim=True)  # rows have scales of their own
    d = balance(x.square().mean(0).sqrt(), weight).double()
    generator = torch.Generator().manual_seed(0)

    def lost(d: torch.Tensor) -> tuple[float, float]:
        """What noise in the turned weight, and in the turned input, does to the outputs, by sampling."""
        inner, outer = x / d, weight * d
        of_weight = of_input = 0.0
        for _ in range(200):
            noise = torch.randn(outer.shape, generator=generator, dtype=torch.float64)
            of_weight += float((inner @ (noise * outer.norm(dim=1, keepdim=True)).T).square().sum())
            noise = torch.randn(inner.shape, generator=generator, dtype=torch.float64)
            of_input += float(((noise * inner.norm(dim=1, keepdim=True)) @ outer.T).square().sum())
        return of_weight, of_input

    with_d, without = lost(d), lost(torch.ones(width, dtype=torch.float64))
    site = next(s for s in Adapter(model).sites.of("input") if BLOCK + path in s.readers)
    assert gains[BLOCK + path] == pytest.approx(with_d[0] / without[0], rel=0.05)
    assert gains[site.name] == pytest.approx(with_d[1] / without[1], rel=0.05)
    assert gains[site.name] < 0.7


def test_feedback_has_another_strength(model):
    path = BLOCK + "mlp.down_proj"
    by_gptq = LinearScheme(WeightScheme("int4"), None, Transform(64, 64, 64, 1), diagonal=True)
    rounded = replace(by_gptq, input=ActivationScheme("int4"))
    assert [strength_for([scheme]) for scheme in (by_gptq, rounded)] == [0.25, 0.5]
    assert strength_for([by_gptq, rounded]) == 0.5
    found = [slope_gains(runner_of(Adapter(model)), IDS, {path: scheme})[path] for scheme in (by_gptq, rounded)]
    assert found[0] > found[1]  # nothing beats 1/2 without feedback


def test_other_sites_keep_their_slopes(model):
    path = BLOCK + "mlp.down_proj"
    scheme = LinearScheme(transform=Transform(64, 64, 64, 1), diagonal=True)
    found = slope_gains(runner_of(Adapter(model)), IDS, {path: scheme, BLOCK + "mlp.up_proj": LinearScheme()})
    assert len(found) == 2
    assert path in found


# --- feedback -------------------------------------------------------------------------------------------------------

BY_GPTQ = WeightScheme("gauss6", method="gptq", scale_search="rms", sweeps=0)
TO_NEAREST = replace(BY_GPTQ, method="nearest")
DOWN = BLOCK + "mlp.down_proj"
TEXT = torch.randint(50, (16, 128), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def deep() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # inputs of very different sizes, and related to each other
            layer.weight.data *= 3 * torch.randn(layer.out_features, 1).exp()
    return model


def gains_of(model, linears: dict[str, LinearScheme], **given) -> dict[str, float]:
    return slope_gains(runner_of(Adapter(model)), TEXT, linears, fed_back(linears), **given)


def fed_back(linears: dict[str, LinearScheme]) -> list[str]:
    return [name for name, scheme in linears.items() if scheme.weight and scheme.weight.method == "gptq"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_gains_are_those_of_rounding(deep, diagonal):
    transform = Transform(96, 96, 96, 1)
    scheme = LinearScheme(BY_GPTQ, transform=transform, diagonal=diagonal)
    x = inputs_of(deep, DOWN, TEXT).float()
    weight = deep.get_submodule(DOWN).weight.detach()
    weight = weight / weight.norm(dim=1, keepdim=True)
    d = balance(x.double().square().sum(0).sqrt(), weight, strength_for([scheme])).float() if diagonal else 1.0

    def lost(d, method: str) -> float:
        sums = InputStatistics()
        sums.add(transform.apply(x / d))
        turned = transform.apply(weight * d)
        by_gptq = method == "gptq"
        made = (
            quantize_gptq(turned, sums, BY_GPTQ, share=0, damp=sums.damping)
            if by_gptq else quantize_nearest(turned, TO_NEAREST)
        )  # fmt: skip
        error, metric = made.dequantize() - turned, sums.metric(sums.damping)
        return float(((error @ metric.gram) * error).sum())

    gain = gains_of(deep, {DOWN: scheme})[DOWN]
    assert gain < 0.9
    assert gain == pytest.approx(lost(d, "gptq") / lost(1.0, "nearest"), rel=0.1)


def test_readers_of_an_input_share_what_they_have_in_common(deep):
    q, k, v = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    turned = replace(LinearScheme(BY_GPTQ), transform=Transform(64, 64, 64, 1))
    found = gains_of(deep, {q: LinearScheme(BY_GPTQ), k: turned, v: LinearScheme(TO_NEAREST)})
    assert found.keys() == {q, k}
    assert found[q] != found[k]
    assert found == gains_of(deep, {q: LinearScheme(BY_GPTQ), k: turned})


def test_a_diagonal_is_that_of_all_its_readers(deep):
    """One of them rounded to nearest is a reason for another strength, as quantizing has it."""
    q, v = (f"model.layers.1.self_attn.{name}_proj" for name in "qv")
    scheme = LinearScheme(BY_GPTQ, transform=Transform(64, 64, 64, 1), diagonal=True)
    alone, beside = (
        gains_of(deep, {q: scheme, v: replace(scheme, weight=weight)})[q] for weight in (BY_GPTQ, TO_NEAREST)
    )
    assert alone != pytest.approx(beside, rel=1e-3)


def test_experts_get_what_is_usual():
    adapter = Adapter(MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SIZES)).eval())
    names = [site.name for site in adapter.sites.of("linear")]
    gains = slope_gains(runner_of(adapter), TEXT[:4], dict.fromkeys(names, LinearScheme(BY_GPTQ)), names)
    assert gains.keys() == set(names)
    own = torch.tensor([gain for name, gain in gains.items() if "experts" not in name])
    assert len(set(own.tolist())) > 2
    usual = float(own.double().log().mean().exp())
    assert all(gain == pytest.approx(usual) for name, gain in gains.items() if "experts" in name)


def test_an_input_that_is_always_zero_gains_nothing():
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()
    model.get_submodule(BLOCK + "mlp.up_proj").weight.data.zero_()
    for scheme in (LinearScheme(BY_GPTQ), LinearScheme(BY_GPTQ, transform=Transform(96, 96, 96, 1), diagonal=True)):
        assert gains_of(model, {DOWN: scheme}) == {DOWN: 1.0}


def test_what_is_not_finite_is_refused():
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()
    model.get_submodule(BLOCK + "mlp.up_proj").weight.data[3] = torch.nan
    with pytest.raises(
        PaleyError, match=rf"{DOWN}: what it reads is NaN or infinite on the calibration text; look for"
    ):
        gains_of(model, {DOWN: LinearScheme(BY_GPTQ)})


def test_blocks_have_turns(deep):
    turns: list[tuple[str, int]] = []
    begin, end = (lambda block, what=what: turns.append((what, block.index)) for what in ("begin", "end"))
    assert gains_of(deep, {DOWN: LinearScheme(BY_GPTQ)}, begin=begin, end=end) == gains_of(
        deep, {DOWN: LinearScheme(BY_GPTQ)}
    )
    assert turns == [("begin", 0), ("end", 0), ("begin", 1), ("end", 1)]
