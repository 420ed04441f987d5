"""Slopes from gradients are those that small noise shows."""

from __future__ import annotations

import pytest
import torch
from test_calibrate import IDS, small_adapter
from test_model_sensitivity import qwen3_adapter
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from paley.core.errors import PaleyError
from paley.model.adapter import Adapter
from paley.model.curvature import gradient_slopes
from paley.model.replay import runner_of
from paley.model.sensitivity import KINDS, NoiseProbe

T, DRAWS, TEXTS = 0.03, 24, 48  # size of the noise, its draws, and how often each text gets other tokens


def mixtral() -> Adapter:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=3, initializer_range=0.2,
    )  # fmt: skip
    return Adapter(MixtralForCausalLM(config).eval().requires_grad_(False))


def gpt2() -> Adapter:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, initializer_range=0.2)
    return Adapter(GPT2LMHeadModel(config).eval().requires_grad_(False))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("made", "kinds"),
    [
        (small_adapter, KINDS),
        (lambda: small_adapter(tie_word_embeddings=True), ("weight",)),
        (qwen3_adapter, KINDS),
        (mixtral, KINDS),
        (gpt2, ("weight", "input")),
    ],
    ids=["llama", "tied", "qwen3", "mixtral", "gpt2"],
)
def test_small_noise_adds_what_gradients_say(made, kinds, rotated):
    adapter, ids = made(), IDS[:2, :16]
    if rotated and adapter.architecture.walked:
        pytest.skip("such models are not rotated")
    slopes = gradient_slopes(adapter, ids.repeat(TEXTS, 1), kinds, rotated=rotated, seed=1)
    probe = NoiseProbe(runner_of(adapter), ids, metric="kl", kinds=kinds, rotated=rotated)
    assert slopes.keys() == probe.sites.keys()
    ratios = {}
    for name, slope in slopes.items():
        measured = torch.tensor([probe.delta(name, T, draw) for draw in range(DRAWS)]).double() / T**2
        assert slope.stderr < 0.25 * slope.alpha
        ratios[name] = slope.alpha / float(measured.mean())
        error = slope.stderr / slope.alpha + float(measured.std() / measured.mean()) / DRAWS**0.5
        assert ratios[name] == pytest.approx(1, abs=0.03 + 3.5 * error), name
    assert sum(ratios.values()) / len(ratios) == pytest.approx(1, abs=0.06)


def test_the_model_is_left_as_it_was():
    adapter = small_adapter()
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in adapter.model.modules()]
    first = gradient_slopes(adapter, IDS[:2], KINDS)
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in adapter.model.parameters())
    now = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in adapter.model.modules()]
    assert now == hooks
    assert first == gradient_slopes(adapter, IDS[:2], KINDS)
    assert first != gradient_slopes(adapter, IDS[:2], KINDS, seed=1)


def test_inputs_alone_need_no_gradient_of_a_weight():
    alone = gradient_slopes(small_adapter(), IDS[:2], ("input",))
    assert alone == {n: s for n, s in gradient_slopes(small_adapter(), IDS[:2], KINDS).items() if n in alone}


def test_what_is_not_finite_is_refused():
    adapter = small_adapter()
    down = adapter.model.model.layers[1].mlp.down_proj
    handle = down.register_full_backward_hook(lambda module, inner, outer: (inner[0] * torch.inf,))
    with pytest.raises(PaleyError, match=r"layers\.1\.mlp\.(up|down)_proj: the gradient is NaN or infinite"):
        gradient_slopes(adapter, IDS[:1], ("weight",), on_sequence=handle.remove)
    down.weight.data[3, 5] = torch.inf
    with pytest.raises(PaleyError, match="the logits of the model as it is are NaN or infinite"):
        gradient_slopes(adapter, IDS[:1], ("weight",))


@pytest.mark.parametrize("kinds", [("weight",), ("weight", "input", "keys", "values")])
def test_a_model_without_gradients_is_refused(monkeypatch, kinds):
    adapter = small_adapter()
    forward = adapter.model.model.forward
    monkeypatch.setattr(adapter.model.model, "forward", torch.no_grad()(forward))
    monkeypatch.setattr(adapter.model.lm_head, "forward", torch.no_grad()(adapter.model.lm_head.forward))
    with pytest.raises(PaleyError, match=r"have no gradient: this model computes without; measure with method=noise"):
        gradient_slopes(adapter, IDS[:1], kinds)
