"""Slopes behind GPTQ's feedback: the closed form is what rounding with it loses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from paley.core.schemes import LinearScheme, WeightScheme
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.methods.statistics import InputStatistics
from paley.model import feedback_gains as module
from paley.model.adapter import Adapter
from paley.model.capture import capture_inputs
from paley.model.feedback_gains import feedback_gains

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BY_GPTQ = WeightScheme("gauss6", method="gptq", scale_search="rms", sweeps=0)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # inputs of very different sizes, and related to each other
            layer.weight.data *= 3 * torch.randn(layer.out_features, 1).exp()
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(50, (16, 128), generator=torch.Generator().manual_seed(1))


def test_gains_are_those_of_rounding(model, ids):
    adapter = Adapter(model)
    sums = InputStatistics()
    with torch.no_grad(), capture_inputs({DOWN: adapter.module(DOWN)}, lambda _, x: sums.add(x)):
        for sequence in ids:
            model(sequence[None])
    weight = torch.randn(512, 96, generator=torch.Generator().manual_seed(2))  # as rotations make weights
    by_gptq = quantize_gptq(weight, sums, BY_GPTQ, compensate=False, damp=sums.damping)
    rounded = quantize_nearest(weight, replace(BY_GPTQ, method="nearest"))
    metric = sums.metric(sums.damping).gram

    def lost(made) -> float:
        error = made.dequantize() - weight
        return float(((error @ metric) * error).sum())

    gain = feedback_gains(adapter, ids, {DOWN: LinearScheme(BY_GPTQ)})[DOWN]
    assert gain < 0.8
    assert gain == pytest.approx(lost(by_gptq) / lost(rounded), rel=0.05)


def test_readers_of_an_input_share_a_gain_and_parts_change_nothing(model, ids, monkeypatch):
    linears = {
        name: LinearScheme(BY_GPTQ) for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }  # fmt: skip
    linears["model.layers.1.mlp.up_proj"] = LinearScheme(replace(BY_GPTQ, method="nearest"))
    whole = feedback_gains(Adapter(model), ids, linears)
    assert whole.keys() == linears.keys() - {"model.layers.1.mlp.up_proj"}
    assert whole["model.layers.0.self_attn.q_proj"] == whole["model.layers.0.self_attn.v_proj"]
    assert len({round(gain, 6) for gain in whole.values()}) == 8
    monkeypatch.setattr(module, "_HELD", 1)
    assert feedback_gains(Adapter(model), ids, linears) == pytest.approx(whole)


def test_experts_get_what_is_usual(ids):
    config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, **SIZES)
    adapter = Adapter(MixtralForCausalLM(config).eval())
    names = [site.name for site in adapter.sites.of("linear")]
    gains = feedback_gains(adapter, ids[:4], dict.fromkeys(names, LinearScheme(BY_GPTQ)))
    assert gains.keys() == set(names)
    assert all(0 < gain <= 1 for gain in gains.values())


def test_an_input_that_is_always_zero_gains_nothing(ids):
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)).eval()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data.zero_()
    assert feedback_gains(Adapter(model), ids[:4], {DOWN: LinearScheme(BY_GPTQ)}) == {DOWN: 1.0}
