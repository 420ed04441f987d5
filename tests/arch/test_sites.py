"""Sites follow from a row: shapes equal those of the real modules, and who reads and writes what is right."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from family_configs import CONFIGS as MADE
from paley.arch import FAMILIES, family, sites, window
from paley.core.errors import PaleyError
from paley.model.embedding import scale_of
from paley.model.stacks import module_at

CONFIGS = {
    kind: make(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=kind in ("qwen2", "gemma3_text"))
    for kind, make in MADE.items()
}


def found(kind):
    return sites(family(kind), CONFIGS[kind])


def test_every_family_is_covered():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_and_paths_are_those_of_the_modules(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    places, linears = found(kind), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    stacks = {name: module_at(model, name) for name, p in model.named_parameters() if p.dim() == 3}
    assert {site.module for site in places.values() if site.is_weight} == {*linears, *stacks}
    for site in places.values():
        if site.is_weight:
            held = stacks[site.module] if site.experts else linears[site.module]
            assert site.shape == tuple(held.weight.shape)
            assert site.experts == getattr(held, "experts", 0)
            assert site.tensor in model.state_dict()
        if site.kind == "input":
            assert all((linears | stacks)[path].in_features == site.shape[0] for path in site.readers)
            assert all(model.get_submodule(path).weight.shape[1] == site.shape[0] for path in site.beside)
            assert site.norm is None or model.get_submodule(site.norm) is not None
        if site.kind in ("keys", "values"):
            assert site.shape[1] == model.get_submodule(site.module).head_dim
            assert model.get_submodule(site.made_by) is not None
    assert places.tied == CONFIGS[kind].tie_word_embeddings
    assert places.head.stored_as == ("model.embed_tokens" if places.tied else "lm_head")
    linear = [name for name, module in linears.items() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(places.weights) == len(linear) + len(stacks) + (1 if places.tied else 2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_row_says_what_the_modules_do(kind):
    """What a decoder without these modules must know."""
    config, row = CONFIGS[kind], family(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for index, block in enumerate(model.model.layers):
        attention = block.self_attn
        assert row.attention_scale(config) == pytest.approx(attention.scaling)
        if kind != "gemma3_text":  # whose scores transformers does not cap, whatever its config says
            assert row.number(config, "attention_softcap") == getattr(attention, "attn_logit_softcapping", None)
        assert row.has_rope(config, index) == bool(getattr(attention, "use_rope", True))
        assert window(config, index) == getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        assert row.number(config, "residual_multiplier", 1.0) == getattr(block, "residual_multiplier", 1.0)
        own = row.at(config, index)
        assert (next(own.routers(), None) is None) == (not hasattr(block.mlp, "experts"))
        mlp = getattr(block.mlp, "experts", block.mlp)
        act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
        if own.gate_limits is not None:
            assert [getattr(config, name) for name in own.gate_limits] == [mlp.alpha, mlp.limit]
        else:
            assert type(act) is type(ACT2FN[getattr(config, row.activation)])
        assert hasattr(attention, "sinks") == bool(row.sinks)
        for norm in row.norms():
            assert hasattr(block.get_submodule(norm.path), row.epsilon)
    assert type(model.get_submodule(row.rotary)).__name__.endswith("RotaryEmbedding")


def test_the_order_is_that_of_computation():
    names = [site.name.removeprefix("model.layers.0.") for site in found("qwen3").values() if site.block in (0, None)]
    assert names == [
        "model.embed_tokens", "attn_input", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "keys",
        "values", "o_input", "self_attn.o_proj", "mlp_input", "mlp.gate_proj", "mlp.up_proj", "down_input",
        "mlp.down_proj", "head_input", "lm_head",
    ]  # fmt: skip


def test_what_can_be_folded_follows_from_the_norms():
    llama, gemma = family("llama"), family("gemma3_text")
    assert llama.why_stream_is_fixed() is None
    assert "post_attention_layernorm" in gemma.why_stream_is_fixed()


def test_who_adds_to_the_stream():
    adding = {site.name: site.norm for site in found("llama").of("linear", block=1) if site.adds_to_stream}
    assert adding == {
        "model.layers.1.self_attn.o_proj": "model.layers.1.input_layernorm",
        "model.layers.1.mlp.down_proj": "model.layers.1.post_attention_layernorm",
    }
    assert not any(site.adds_to_stream for site in found("gemma3_text").of("linear"))  # a norm does


def test_keys_of_a_normed_family_are_made_by_the_norm():
    (keys,) = found("gemma3_text").of("keys", block=2)
    assert keys.made_by == "model.layers.2.self_attn.k_norm"
    assert found("llama").of("values", block=0)[0].made_by == "model.layers.0.self_attn.v_proj"


def test_a_wider_stream_widens_what_touches_it():
    places = found("llama")
    shapes = {site.name.rpartition(".")[2]: places.shape_in(site, 60) for site in places.of("linear", block=0)}
    assert shapes["q_proj"] == (48, 60)
    assert shapes["o_proj"] == (60, 48)
    assert shapes["down_proj"] == (60, 88)
    assert places.shape_in(places.embedding, 60) == (61, 60)
    tied = found("qwen2")
    assert tied.shape_in(tied.embedding, 60) == (61, 48)  # a tied pair keeps its width
    assert tied.shape_in(tied.head, 60) == (61, 48)


def test_windows_follow_the_config():
    assert [window(CONFIGS["gemma3_text"], i) for i in range(3)] == [8, 8, 8]
    assert window(SimpleNamespace(sliding_window=8, layer_types=["full_attention"]), 0) is None
    assert window(CONFIGS["mistral"], 0) == 8
    assert window(CONFIGS["llama"], 0) is None


def test_an_unknown_family_gets_no_hint_at_another():
    """To call a model by another family's name would load it, and compute something else."""
    with pytest.raises(PaleyError, match=r"'lama' is not supported; supported: [^?]*llama[^?]*$"):
        family("lama")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_row_scales_embeddings_as_the_module_does(kind):
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(CONFIGS[kind]).model.embed_tokens
    assert family(kind).embedding_scale(CONFIGS[kind]) == pytest.approx(scale_of(module))


def test_a_cache_holds_its_window():
    (keys,) = found("gemma3_text").of("keys", block=0)
    assert [keys.tokens(n) for n in (4, 8, 100)] == [4, 8, 8]
    assert found("llama").of("keys", block=0)[0].tokens(100) == 100
