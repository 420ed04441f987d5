"""Slopes behind a diagonal: the closed form is what noise does."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.methods.diagonal import balance, strength_for
from paley.model.adapter import Adapter
from paley.model.balance_gains import balance_gains

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


def inputs_of(model: LlamaForCausalLM, path: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("path", ["mlp.down_proj", "self_attn.o_proj"])
def test_gains_are_those_of_noise(model, path):
    linear = model.get_submodule(BLOCK + path)
    width = linear.in_features
    scheme = LinearScheme(transform=Transform(width, width, width, 1), diagonal=True)
    gains = balance_gains(Adapter(model), IDS, {BLOCK + path: scheme})
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
    found = [balance_gains(Adapter(model), IDS, {path: scheme})[path] for scheme in (by_gptq, rounded)]
    assert found[0] > found[1]  # nothing beats 1/2 without feedback


def test_other_sites_keep_their_slopes(model):
    path = BLOCK + "mlp.down_proj"
    scheme = LinearScheme(transform=Transform(64, 64, 64, 1), diagonal=True)
    found = balance_gains(Adapter(model), IDS, {path: scheme, BLOCK + "mlp.up_proj": LinearScheme()})
    assert len(found) == 2
    assert path in found
