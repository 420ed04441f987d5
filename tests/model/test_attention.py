import math

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paley.core import rounding
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.core.transforms import Transform
from paley.model.attention import attach_schemes, attention, register
from paley.model.kv_cache import PackedKVCache, cache_argument

NAMES = ["llama", "mistral", "mistral-full", "qwen2", "qwen3", "gemma3"]
WINDOWS = {"mistral": [8, 8], "gemma3": [8, None], "qwen2": [None, 5], "mistral-full": [None, None]}
VOCAB = 61


def tiny(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random 2-layer model with grouped heads and weights large enough that attention matters."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, head_dim=8, sliding_window=8)),
        "mistral-full": lambda: MistralForCausalLM(MistralConfig(**sizes, head_dim=16, sliding_window=None)),
        "qwen2": lambda: Qwen2ForCausalLM(
            Qwen2Config(**sizes, use_sliding_window=True, sliding_window=5, max_window_layers=1)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=24)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **sizes,
                head_dim=8,
                sliding_window=8,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
    }[name]()
    model = model.to(dtype).eval()
    for block in model.model.layers:
        if (bias := block.self_attn.k_proj.bias) is not None:
            bias.data.normal_(0.0, 3.0)
    return model


def head_dim(model: PreTrainedModel) -> int:
    return model.model.layers[0].self_attn.head_dim


def scheme_for(
    model: PreTrainedModel, keys: str = "uint3", values: str = "int4", center: bool | str = False
) -> AttentionScheme:
    n = head_dim(model)
    return AttentionScheme(
        ActivationScheme(keys, clip_ratio=0.95),
        ActivationScheme(values, group_size=n // 2),
        Transform(n, n, n, seed=7),
        center,
        rotate_values=center is not False,
    )


def attach(model: PreTrainedModel, scheme: AttentionScheme) -> PreTrainedModel:
    """Mean keys, if the scheme wants some, are random and large."""
    attach_schemes(model, {f"model.layers.{i}.self_attn": scheme for i in range(2)})
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith(("key_offset", "key_mean")):
            buffer.normal_(0.0, 3.0, generator=generator)
    return model


def some_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def in_chunks(model: PreTrainedModel, ids: torch.Tensor, size: int) -> torch.Tensor:
    cache = PackedKVCache(model)
    return torch.cat([model(chunk, **cache_argument(model, cache)).logits for chunk in ids.split(size, 1)], 1)


CENTERED = [(name, center) for name in NAMES for center in (False, "mean")] + [("qwen2", "bias"), ("llama", True)]


@pytest.mark.parametrize(("name", "center"), CENTERED)
@torch.no_grad()
def test_one_long_forward_is_the_forward_in_chunks_and_token_by_token(name, center):
    model = tiny(name)
    ids = some_ids(2, 23)
    exact = model(ids, use_cache=False).logits
    attach(model, scheme_for(model, center=center))
    long = model(ids, use_cache=False).logits
    assert (long - exact).abs().max() > 0.1  # quantized indeed
    foreign = model(ids, use_cache=True).logits  # transformers' own DynamicCache, which holds plain tensors
    for other in (foreign, in_chunks(model, ids, 23), in_chunks(model, ids, 5), in_chunks(model, ids, 1)):
        torch.testing.assert_close(other, long, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["plain", "rounded", "centred"])
@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_a_window_is_all_that_its_layer_keeps_and_chunks_of_any_size_agree(name, how):
    model = tiny(name)
    center = "mean" if how == "centred" else False
    attach(model, AttentionScheme() if how == "plain" else scheme_for(model, center=center))
    ids = some_ids(2, 40)
    long = model(ids, use_cache=False).logits
    for size in (1, 3, 11):
        torch.testing.assert_close(in_chunks(model, ids, size), long, rtol=0, atol=1e-10)
    cache = PackedKVCache(model)
    model(ids, **cache_argument(model, cache))
    whole = next((layer.nbytes for layer in cache.layers if layer.window is None), None)
    for layer, window in zip(cache.layers, WINDOWS[name], strict=True):
        assert layer.window == window
        assert layer.get_seq_length() == 40
        if window is not None and whole is not None:
            assert layer.nbytes == whole // 40 * (window - 1)
    if None in WINDOWS[name] and set(WINDOWS[name]) != {None}:
        with pytest.raises(PaleyError, match="begin a new cache"):
            cache.crop(-1)
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]  # none went back alone


@pytest.mark.parametrize(("keys", "values"), [("int2", None), (None, "odd2"), ("gauss3", "gauss3")])
@torch.no_grad()
def test_keys_and_values_may_differ_or_stay(keys, values):
    model = tiny("llama", torch.float32)
    make = lambda grid: None if grid is None else ActivationScheme(grid)  # noqa: E731
    attach(model, AttentionScheme(make(keys), make(values), Transform(8, 8, 8)))
    ids = some_ids(1, 17)
    torch.testing.assert_close(in_chunks(model, ids, 4), model(ids, use_cache=False).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_schemes_nothing_changes_by_a_bit(name):
    model = tiny(name, torch.float32)
    ids = some_ids(2, 11)
    exact = model(ids, use_cache=False).logits
    n = head_dim(model)
    for schemes in ({}, {"model.layers.1.self_attn": AttentionScheme(transform=Transform(n, n, n))}):
        attach_schemes(model, schemes)
        assert model.config._attn_implementation == "paley"
        assert torch.equal(model(ids, use_cache=False).logits, exact)
    assert torch.equal(in_chunks(model, ids, 11), exact)


@pytest.mark.parametrize("rotate_values", [False, True])
@pytest.mark.parametrize("width", [8, 12])
@torch.no_grad()
def test_attention_by_hand(width, rotate_values):
    """softmax(q . T'round(T k) / sqrt(d)) T'round(T v), with the heads repeated, written out; or without T for v."""
    scheme_k, scheme_v = ActivationScheme("int3"), ActivationScheme("uint2", group_size=4)
    transform = Transform(8, width, 4, seed=2)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = 2, True, False
    module.kv_scheme = AttentionScheme(scheme_k, scheme_v, transform, rotate_values=rotate_values)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    got, _ = attention(module, q, k, v, None, scaling=1 / math.sqrt(8))

    k_hat = transform.adjoint(rounding.round_trip(transform.apply(k), scheme_k, torch.float16))
    v_hat = rounding.round_trip(transform.apply(v) if rotate_values else v, scheme_v, torch.float16)
    v_hat = transform.adjoint(v_hat) if rotate_values else v_hat
    scores = q @ k_hat.repeat_interleave(2, 1).mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    want = (scores.softmax(-1) @ v_hat.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def generate(model: PreTrainedModel, ids: torch.Tensor, *, packed: bool, **options) -> torch.Tensor:
    cache = cache_argument(model, PackedKVCache(model)) if packed else {}
    torch.manual_seed(3)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "do_sample": False, **options}
    return model.generate(ids, **cache, **options)


@pytest.mark.parametrize("center", [False, "mean"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_greedy_generation_is_that_of_the_default_cache(name, center):
    model = attach(tiny(name), scheme_for(tiny(name), center=center))
    ids = some_ids(2, 9)
    assert torch.equal(generate(model, ids, packed=True), generate(model, ids, packed=False))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
@pytest.mark.parametrize("center", [False, "mean"])
def test_beams_and_samples_are_those_of_the_default_cache(options, center):
    model = attach(tiny("llama"), scheme_for(tiny("llama"), center=center))
    ids = some_ids(2, 7)
    packed = generate(model, ids, packed=True, **options)
    assert torch.equal(packed, generate(model, ids, packed=False, **options))
    assert len(packed) == 2 * options["num_return_sequences"]


@pytest.mark.parametrize("center", [False, "mean"])
def test_a_cache_goes_on_after_a_crop(center):
    model = attach(tiny("llama"), scheme_for(tiny("llama"), center=center))
    ids = some_ids(1, 12)
    cache = PackedKVCache(model)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
        cache.crop(-4)
        again = model(ids[:, 8:], **cache_argument(model, cache)).logits
        torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 8:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("center", [False, "mean"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_left_padding_changes_no_row(name, center):
    model = attach(tiny(name), scheme_for(tiny(name), center=center))
    long, short = some_ids(1, 10), some_ids(1, 6)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = (batch != 0).long()
    together = generate(model, batch, packed=True, attention_mask=mask)
    assert torch.equal(together, generate(model, batch, packed=False, attention_mask=mask))
    assert torch.equal(together[:1], generate(model, long, packed=True))
    assert torch.equal(together[1:, 4:], generate(model, short, packed=True))


def test_attaching_again_replaces_all_schemes():
    model = attach(tiny("llama"), scheme_for(tiny("llama")))
    attach_schemes(model, {"model.layers.1.self_attn": AttentionScheme()})
    assert model.model.layers[0].self_attn.kv_scheme is None
    assert model.model.layers[1].self_attn.kv_scheme == AttentionScheme()
    register()
    register()


def test_schemes_that_fit_nothing_are_refused():
    model = tiny("llama")
    thirds = ActivationScheme("int4", group_size=3)
    for name, scheme, message in [
        (
            "model.layers.0.self_atn",
            AttentionScheme(),
            r"no attention module .* did you mean 'model.layers.0.self_attn'",
        ),
        ("model.layers.0.mlp", AttentionScheme(), "no attention module"),
        (
            "model.layers.0.self_attn",
            AttentionScheme(transform=Transform(16, 16, 16)),
            "in_dim=16, but head_dim=8",
        ),
        ("model.layers.0.self_attn", AttentionScheme(keys=thirds), "keys of width 8 .* group_size=3"),
        ("model.layers.0.self_attn", AttentionScheme(values=thirds), "values of width 8 .* group_size=3"),
    ]:
        with pytest.raises(PaleyError, match=message):
            attach_schemes(model, {name: scheme})
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_cannot_be_replaced_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(PaleyError, match="does not let its attention be replaced"):
        attach(model, AttentionScheme(ActivationScheme("int4")))


def test_a_cache_made_for_other_schemes_is_refused():
    model = attach(tiny("llama"), scheme_for(tiny("llama")))
    cache = PackedKVCache(model)
    attach(model, scheme_for(model, keys="uint4"))
    with torch.no_grad(), pytest.raises(PaleyError, match="build a new PackedKVCache"):
        model(some_ids(1, 3), **cache_argument(model, cache))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_centering_keys_changes_nothing_but_the_rounding(name):
    model = tiny(name)
    ids = some_ids(2, 23)
    exact = model(ids, use_cache=False).logits
    attach(model, AttentionScheme(ActivationScheme("int8"), None, center_keys=True))
    errors = []
    for size in (0.0, 1.0, 300.0):  # a mean that is far off costs precision, and nothing else
        for layer in model.model.layers:
            mean = layer.self_attn.key_mean
            assert mean.shape == (2, head_dim(model))
            mean.copy_(size * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)))
        long = model(ids, use_cache=False).logits
        torch.testing.assert_close(in_chunks(model, ids, 5), long, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(ids, use_cache=True).logits, long, rtol=0, atol=1e-10)
        errors.append(float((long - exact).abs().max()))
    assert errors[0] < errors[2]
    assert errors[1] < 1.0 < exact.abs().max()


@torch.no_grad()
def test_the_true_mean_makes_keys_smaller_to_round():
    module = (
        attach(tiny("llama"), AttentionScheme(ActivationScheme("uint3"), None, center_keys=True))
        .model.layers[0]
        .self_attn
    )
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 19, 8, generator=g) for heads in (4, 2, 2))
    shared = 3 * torch.randn(2, 8, generator=g)
    exact, _ = attention(nn.Identity(), query, *expand_heads(key, value), None, scaling=0.35)
    errors = []
    for mean in (torch.zeros(2, 8), shared):
        module.key_mean.copy_(mean)
        made, _ = attention(module, query, key + shared[:, None], value, None, scaling=0.35)
        errors.append(float((made - exact).square().mean()))
    assert errors[1] < 0.2 * errors[0]


def expand_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.repeat_interleave(2, 1) for x in tensors]


def test_no_mean_without_quantized_keys():
    model = attach(tiny("llama"), AttentionScheme(None, ActivationScheme("int4"), center_keys=True))
    assert not [name for name, _ in model.named_buffers() if "key_mean" in name]
