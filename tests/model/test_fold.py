"""Every architecture's contract: folding, rotating and widening leave float64 logits as they were."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from family_configs import CONFIGS, plain_attention
from paley.arch import FAMILIES
from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme, LinearScheme, Schemes
from paley.core.transforms import Transform
from paley.model.adapter import Adapter
from paley.model.attention import register
from paley.model.rotation import decide_turning, rotate_
from paley.model.wrapping import wrap_

FOLDING = [kind for kind in CONFIGS if FAMILIES[kind].why_stream_is_fixed() is None]


class ExactNorm(torch.nn.Module):
    """RMSNorm that stays in float64; transformers' own goes through float32 and would hide small errors."""

    def __init__(self, norm, row):
        super().__init__()
        self.weight, self.name, self.offset = norm.weight, row.epsilon, row.gain_offset
        setattr(self, row.epsilon, getattr(norm, row.epsilon))

    def forward(self, x):
        gain = self.offset + self.weight
        return gain * x * (x.square().mean(-1, keepdim=True) + getattr(self, self.name)).rsqrt()


def exact(model):
    row = FAMILIES[model.config.model_type]
    if any(row.routers()):
        model.config._experts_implementation = "eager"
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module, row))
    if row.scaled_embedding:
        embedding = model.model.embed_tokens
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=torch.float64)
    if row.attention_softcap or row.sinks:  # the eager attention of transformers goes through float32
        register()
        model.set_attn_implementation("paley")
    return model


def random_model(kind, **settings):
    torch.manual_seed(0)
    config = CONFIGS[kind](attn_implementation=plain_attention(kind), rms_norm_eps=1e-3, **settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.config._experts_implementation = "eager"  # the others lack float64
    row = FAMILIES[kind]
    for name, p in model.named_parameters():  # norms and biases too must matter
        p.data = torch.randn_like(p) * 0.3 + (1.0 - row.gain_offset if "norm" in name else 0.0)
    return model.requires_grad_(False)


def logits(model):
    ids = torch.arange(40).view(2, 20) % 61
    return model(ids, use_cache=False).logits


def turned(model, mode="folded", **settings):
    """The model under a rotation, wrapped; its turning."""
    adapter = Adapter(model)
    turning = decide_turning(adapter.sites, mode, block=settings.pop("block", 1024), seed=0, **settings)
    stream = turning.rotation.stream if turning.rotation else None
    width = None if stream is None else stream.out_dim
    places = adapter.sites
    linears = {
        site.name: LinearScheme(transform=turning.of(site, places.shape_in(site, width)[1])) for site in places.weights
    }
    runs = {n: s.transform for n, s in linears.items() if s.transform is not None and n != places.embedding.name}
    rotate_(adapter, turning.rotation, runs)
    heads = turning.rotation.heads if turning.rotation else None
    attentions = {block.attention: AttentionScheme(transform=heads) for block in adapter.blocks}
    wrap_(adapter, Schemes(linears, attentions))
    return turning


def test_every_architecture_is_covered():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("expand", [0, 12, 16])
@pytest.mark.parametrize("kind", FOLDING)
def test_logits_are_unchanged(kind, expand, kv_heads, tied):
    model = exact(random_model(kind, num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    before = logits(model)
    turned(model, expand=expand, expand_mlp=8)
    assert model.config.hidden_size == 48 + expand
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied  # tied stays tied
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_unchanged_if_inputs_turn_at_run_time(kind, tied):
    model = exact(random_model(kind, num_key_value_heads=2, tie_word_embeddings=tied))
    before = logits(model)
    turned(model, "online", block=16)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


def test_folding_names_the_norm_that_forbids_it():
    adapter = Adapter(random_model("gemma3_text", num_key_value_heads=2))
    with pytest.raises(PaleyError, match=r"folded.*post_attention_layernorm.*set rotate=online"):
        decide_turning(adapter.sites, "folded", block=16, seed=0)


@pytest.mark.parametrize("kind", FOLDING)
def test_an_untied_model_whose_inputs_do_not_turn_saves_as_an_ordinary_checkpoint(kind, tmp_path):
    model = random_model(kind, num_key_value_heads=2, tie_word_embeddings=False)
    before = logits(model)
    adapter = Adapter(model)
    turning = decide_turning(
        adapter.sites, "folded", block=16, seed=0, expand=0 if FAMILIES[kind].heads_follow else 12, rounds=False
    )  # fmt: skip
    rotate_(adapter, turning.rotation, turning.inputs)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    assert (logits(reloaded) - before).abs().max() < 1e-5 * before.abs().max()  # float32 norms


def test_the_rotated_weights_really_differ():
    model = random_model("llama", num_key_value_heads=2)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    turned(model)
    after = model.model.layers[0].self_attn.q_proj.weight
    assert (after - before).abs().max() > 0.1


def test_without_rotation_the_model_stays_as_it_is():
    model = random_model("llama", num_key_value_heads=2, tie_word_embeddings=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    turned(model, "none")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def sites_of(**sizes):
    model = random_model("llama", num_key_value_heads=2)
    for name, size in sizes.items():
        setattr(model.config, name, size)
    return Adapter(model).sites


@pytest.mark.parametrize(
    ("hidden", "bits", "width"), [(4096, 3, 5120), (4096, 4, 5120), (320, 3, 384), (128, 3, 160), (64, 3, 80)]
)
def test_auto_expansion_is_the_cheapest_order_within_the_lemma(hidden, bits, width):
    turning = decide_turning(sites_of(hidden_size=hidden), "folded", block=16, seed=0, expand="auto", bits=[bits, bits])
    stream = turning.rotation.stream
    assert stream == Transform(hidden, width, width, 0)
    assert stream.out_dim * bits <= hidden * (bits + 1)


def test_unreachable_widths_say_what_to_do():
    with pytest.raises(PaleyError, match=r"hidden size 596.*set expand"):
        decide_turning(sites_of(hidden_size=596), "folded", block=16, seed=0)
    sites = sites_of(intermediate_size=596)
    with pytest.raises(PaleyError, match=r"MLP width 596.*expand_mlp"):
        decide_turning(sites, "folded", block=16, seed=0)
    inputs = decide_turning(sites, "folded", block=16, seed=0, expand_mlp="auto").inputs
    assert inputs["down_input"].out_dim > 596
    # nothing to round, nothing to rotate at run time
    assert decide_turning(sites, "folded", block=16, seed=0, rounds=False).inputs == {}


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_unchanged_by_diagonals(kind):
    model = exact(random_model(kind, num_key_value_heads=2, tie_word_embeddings=True))
    before = logits(model)
    turned(model, "online", block=16)
    adapter, generator = Adapter(model), torch.Generator().manual_seed(0)
    for site in adapter.sites.of("input"):
        diagonal = torch.rand(site.shape[0], generator=generator).half() + 0.5
        for path in site.readers:
            if path != adapter.architecture.head and not adapter.sites[path].experts:
                linear = adapter.module(path)
                linear.scheme = LinearScheme(transform=linear.scheme.transform, diagonal=True)
                linear.scale_columns_(diagonal)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
