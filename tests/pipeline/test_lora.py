"""LoRA on coded layers: peft trains float matrices beside codes that stay as they are."""

from __future__ import annotations

import pytest
import torch

import paley
from paley.model.linear import QuantLinear
from paley.pipeline import lora
from tiny_models import higgs, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers

IDS = torch.arange(4, 36)[None] * 7 % 250 + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """Weights of 4 bits, inputs and caches of 8; an MLP of 37 that is padded to 48."""
    root = tmp_path_factory.mktemp("lora")
    save_tiny(root / "model", tiny_tokenizer)
    settings = ("weights.method=nearest", "center_keys=false", "balance_keys=false", "diagonal=false")
    paley.quantize(root / "model", higgs(*settings, name="w4a8kv8"), output=root / "out")
    return root / "out"


def test_peft_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(paley.PaleyError, match=r'pip install "paley\[lora\]"'):
        paley.lora_config(None, None)


def test_gradients_reach_the_first_layer_through_rounded_inputs_and_caches(folder):
    """Without peft: what a matrix beside the first q_proj would be trained by is that of the model without rounding."""
    model = paley.load(folder)
    first = model.model.layers[0].self_attn.q_proj
    beside = torch.zeros(48, 48, requires_grad=True)
    first.register_forward_hook(lambda _, args, y: y + args[0] @ beside.T)
    model(IDS, labels=IDS).loss.backward()
    got = beside.grad.clone()
    assert got.abs().max() > 0
    loss = model(IDS, labels=IDS).loss
    with torch.no_grad():
        beside -= 0.3 * got / got.norm()
    assert model(IDS, labels=IDS).loss < loss


def trained(model, config, steps: int = 12):
    peft = pytest.importorskip("peft", reason="needs peft, of paley[lora]")
    torch.manual_seed(0)
    made = peft.get_peft_model(model, paley.lora_config(model, config))
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = made(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return made.eval(), losses


def config(**options: object):
    peft = pytest.importorskip("peft", reason="needs peft, of paley[lora]")
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


def test_an_adapter_is_trained_saved_and_loaded(folder, tmp_path):
    wanted = config()
    peft = pytest.importorskip("peft")
    model = paley.load(folder)
    codes = {n: t.clone() for n, t in model.state_dict().items()}
    made, losses = trained(model, wanted)
    assert losses[-1] < 0.8 * losses[0]
    kept = {n.replace("base_model.model.", "").replace(".base_layer", ""): t for n, t in made.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in codes.items())
    adapted = {n.rpartition(".")[2] for n, m in made.named_modules() if type(m).__name__ == "QuantLora"}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert wanted.target_modules == "all-linear"  # the caller's is left alone

    made.save_pretrained(tmp_path / "adapter")
    base = paley.load(folder)
    plain = base(IDS).logits
    saved = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=paley.lora_config(base, saved))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, made(IDS).logits)
        with again.disable_adapter():
            assert torch.equal(again(IDS).logits, plain)
        assert not torch.equal(again(IDS).logits, plain)


def test_what_needs_the_float_weight_is_refused(folder):
    model = paley.load(folder)
    for options, words in (({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(paley.PaleyError, match=f"{words}.*float weights.*paley dequantize"):
            paley.lora_config(model, config(**options))
    made, _ = trained(model, config(target_modules=["q_proj"]), steps=1)
    with pytest.raises(paley.PaleyError, match="cannot be merged into codes"):
        made.merge_and_unload()
    assert isinstance(made.base_model.model.model.layers[0].self_attn.k_proj, QuantLinear)
