"""Every architecture's contract: folding, rotating and widening leave float64 logits as they were."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from paley.core.errors import PaleyError
from paley.core.schemes import AttentionSlot, LinearSlot
from paley.core.transforms import Transform
from paley.model.adapter import ARCHITECTURES, Adapter
from paley.model.calibrate import wrap_
from paley.model.rotation import decide_rotation, rotate_
from paley.recipe import Recipe, preset

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda **k: LlamaConfig(**SIZES, **k),
    "mistral": lambda **k: MistralConfig(**SIZES, sliding_window=8, head_dim=16, **k),
    "qwen2": lambda **k: Qwen2Config(**SIZES, **k),
    "qwen3": lambda **k: Qwen3Config(**SIZES, head_dim=16, **k),
}


class ExactNorm(torch.nn.Module):
    """RMSNorm that stays in float64; transformers' own goes through float32 and would hide small errors."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def exact(model):
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    return model


def random_model(kind, **settings):
    torch.manual_seed(0)
    config = CONFIGS[kind](attn_implementation="sdpa", rms_norm_eps=1e-3, **settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for name, p in model.named_parameters():  # norms and biases too must matter
        p.data = torch.randn_like(p) * 0.3 + (1.0 if "norm" in name else 0.0)
    return model.requires_grad_(False)


def logits(model):
    ids = torch.arange(40).view(2, 20) % 61
    return model(ids, use_cache=False).logits


def test_every_architecture_is_covered():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("expand", [0, 12, 16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_unchanged(kind, expand, kv_heads, tied):
    model = exact(random_model(kind, num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    before = logits(model)
    adapter = Adapter(model)
    recipe = preset("w3a3kv3").model_copy(update={"expand": expand, "expand_mlp": 8})
    rotation = decide_rotation(recipe, adapter)
    rotate_(adapter, rotation)
    online = {"o": rotation.output, "down": rotation.mlp}
    linears = {p: LinearSlot(transform=online.get(r)) for b in adapter.blocks for r, p in b.linears()}
    attentions = {b.path("attention"): AttentionSlot(transform=rotation.head) for b in adapter.blocks}
    wrap_(adapter, linears, attentions)
    assert model.config.hidden_size == 48 + expand
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_offline_rotation_saves_as_an_ordinary_checkpoint(kind, tmp_path):
    model = random_model(kind, num_key_value_heads=2, tie_word_embeddings=True)
    before = logits(model)
    recipe = Recipe(expand=12, rotate_output=False)
    rotate_(Adapter(model), replace(decide_rotation(recipe, Adapter(model)), mlp=None))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (logits(reloaded) - before).abs().max() < 1e-5 * before.abs().max()  # float32 norms


def test_the_rotated_weights_really_differ():
    model = random_model("llama", num_key_value_heads=2)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    rotate_(Adapter(model), decide_rotation(Recipe(), Adapter(model)))
    after = model.model.layers[0].self_attn.q_proj.weight
    assert (after - before).abs().max() > 0.1


def test_without_rotation_the_model_stays_as_it_is():
    model = random_model("llama", num_key_value_heads=2, tie_word_embeddings=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rotate_(Adapter(model), decide_rotation(Recipe(rotate=False), Adapter(model)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("hidden", "bits", "width"), [(4096, 3, 5120), (4096, 4, 5120), (320, 3, 384), (128, 3, 160), (64, 3, 80)]
)
def test_auto_expansion_is_the_cheapest_order_within_the_lemma(hidden, bits, width):
    recipe = preset(f"w{bits}a{bits}").model_copy(update={"expand": "auto"})
    adapter = Adapter(random_model("llama", num_key_value_heads=2))
    adapter.model.config.hidden_size = hidden
    residual = decide_rotation(recipe, adapter).residual
    assert residual == Transform(hidden, width, width, 0)
    assert residual.out_dim * bits <= hidden * (bits + 1)


def test_unreachable_widths_say_what_to_do():
    adapter = Adapter(random_model("llama", num_key_value_heads=2))
    adapter.model.config.hidden_size = 596
    with pytest.raises(PaleyError, match=r"hidden size 596.*set expand"):
        decide_rotation(Recipe(), adapter)
    adapter.model.config.hidden_size = 48
    adapter.model.config.intermediate_size = 1192 // 2
    recipe = preset("w4a16")
    with pytest.raises(PaleyError, match=r"MLP width 596.*expand_mlp"):
        decide_rotation(recipe.model_copy(update={"expand_mlp": 0}), adapter)
    assert decide_rotation(recipe, adapter).mlp.out_dim > 596
    assert decide_rotation(Recipe(), adapter).mlp is None  # nothing to round, nothing to rotate at run time


def test_unknown_architecture_is_named():
    model = random_model("llama", num_key_value_heads=2)
    model.config.model_type = "lama"
    with pytest.raises(PaleyError, match=r"'lama' is not supported.*did you mean 'llama'"):
        Adapter(model)
