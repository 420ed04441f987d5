"""What keys have in common is taken off before RoPE: exact where nothing is rounded, and out of the codes' way."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_attention import NAMES, attach, head_dim, scheme_for, some_ids, tiny
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.model.adapter import Adapter
from paley.model.attention import attach_schemes
from paley.model.capture import BlockRunner
from paley.model.key_statistics import KeySettler
from paley.model.keys import MEAN_KEYS, turn
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.ops import attention as op

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


class Exact(BlockRunner):
    """In the model's own type; a runner's hidden states have 32 bits."""

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.adapter.embedding(ids)


def settle(model: PreTrainedModel, ids: torch.Tensor, batch: int = 8) -> dict[str, torch.Tensor]:
    """Measures mean keys, and balances keys, of a model with schemes, which are away meanwhile."""
    modules = {f"model.layers.{i}.self_attn": block.self_attn for i, block in enumerate(model.model.layers)}
    schemes = {name: module.kv_scheme for name, module in modules.items()}
    for module in modules.values():
        module.kv_scheme = None
    runner, settled = Exact(Adapter(model), batch), {}
    settler = KeySettler(runner, ids, schemes)
    for block in runner.adapter.blocks:
        settler.settle(block, {})
        settled |= settler.settled
    for name, module in modules.items():
        module.kv_scheme = schemes[name]
    return settled


def test_a_turn_goes_back_and_leaves_the_rest_of_a_head():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.arange(5.0, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 0.1]).repeat(2)
    table = 1.5 * angles.cos(), 1.5 * angles.sin()  # as RoPE variants scale what they turn
    turned = turn(x, table)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4].norm(dim=-1), 1.5 * x[..., :4].norm(dim=-1))
    a, b = x[..., 0], x[..., 2]  # a pair of values turns as a complex number
    torch.testing.assert_close(
        torch.complex(turned[..., 0], turned[..., 2]), torch.complex(a, b) * 1.5 * torch.exp(1j * angles[..., 0])
    )
    torch.testing.assert_close(turn(turned, table, back=True)[..., :4], 2.25 * x[..., :4])


@pytest.mark.parametrize("center", ["mean", "bias", True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_nothing_changes_where_nothing_is_rounded(name, center, monkeypatch):
    model, ids = tiny(name), some_ids(2, 23)
    if center == "bias" and model.model.layers[0].self_attn.k_proj.bias is None:
        pytest.skip("keys have no bias")
    exact = model(ids, use_cache=False).logits
    attach(model, scheme_for(model, keys="uint2", center=center))
    assert (model(ids, use_cache=False).logits - exact).abs().max() > 0.1
    monkeypatch.setattr(
        op.rounding, "round_trip", lambda x, scheme, dtype=None, transform=None: transform.apply(x) if transform else x
    )
    torch.testing.assert_close(model(ids, use_cache=False).logits, exact, rtol=0, atol=1e-9)


@torch.no_grad()
def test_codes_do_not_depend_on_a_bias_that_is_taken_off():
    model, ids = tiny("qwen2"), some_ids(2, 23)
    codes = []
    for size in (0.0, 1.0, 1000.0):
        for block in model.model.layers:
            block.self_attn.k_proj.bias.data.copy_(size * torch.arange(16.0) / 16)
        attach(model, scheme_for(model, center="bias"))
        cache = PackedKVCache(model)
        model(ids, **cache_argument(model, cache))
        codes.append(cache.layers[0]._keys.read().codes)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_mean_is_that_of_what_rope_turns(name):
    model, ids = tiny(name), some_ids(4, 40)
    made, hooks = dict[int, torch.Tensor](), []
    for index, block in enumerate(model.model.layers):
        part = getattr(block.self_attn, "k_norm", block.self_attn.k_proj)
        hook = lambda module, args, out, index=index: made.__setitem__(index, out)  # noqa: E731
        hooks.append(part.register_forward_hook(hook))
    model(ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    attach(model, scheme_for(model, center="mean"))
    settle(model, ids, batch=2)
    for index, block in enumerate(model.model.layers):
        keys = made[index] if name == "gemma3" else made[index].reshape(4, 40, 2, -1).transpose(1, 2)
        wanted = torch.stack([keys[:, :, 0].mean(0), keys[:, :, 1:].mean((0, 2))])
        torch.testing.assert_close(block.self_attn.key_offset.double(), wanted.half().double(), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_large_mean_costs_keys_nothing_before_rope_and_much_after_it():
    model, ids = tiny("qwen2"), some_ids(2, 40)
    for block in model.model.layers:
        block.self_attn.k_proj.bias.data.zero_()[::5] = 100.0
    exact = model(ids, use_cache=False).logits
    errors = {}
    for center in ("mean", "bias", True, False):
        attach(model, scheme_for(model, keys="uint4", values="int8", center=center))
        if center in ("mean", True):
            settle(model, ids)
        errors[center] = float((model(ids, use_cache=False).logits - exact).square().mean())
    assert errors["mean"] < errors["bias"] * 2
    assert errors["bias"] < errors[True] / 5
    assert errors["bias"] < errors[False] / 5


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_balanced_keys_have_the_same_scores(name):
    """Planted: queries are small where keys are large. Both are then as large as they can be for their product."""
    model, ids = tiny(name), some_ids(4, 40)
    half = head_dim(model) // 2
    for block in model.model.layers:
        size = torch.tensor([9.0, *[1.0] * (half - 1)] * 2, dtype=torch.float64)
        for wire, by in (("k", size), ("q", 1 / size)):
            linear = getattr(block.self_attn, f"{wire}_proj")
            if (norm := getattr(block.self_attn, f"{wire}_norm", None)) is not None:
                offset = 1.0 if name == "gemma3" else 0.0
                norm.weight.data.copy_((norm.weight + offset) * by - offset)
                continue
            linear.weight.data.mul_(by.repeat(len(linear.weight) // (2 * half))[:, None])
            if linear.bias is not None:
                linear.bias.data.mul_(by.repeat(len(linear.weight) // (2 * half)))
    exact = model(ids, use_cache=False).logits
    errors = []
    for balance in (False, True):
        scheme = scheme_for(model, keys="uint4", values="int8", center="mean")
        attach(model, replace(scheme, balance_keys=balance))
        settled = settle(model, ids)
        errors.append(float((model(ids, use_cache=False).logits - exact).square().mean()))
        attach(model, AttentionScheme())
        near = 1e-5 if name == "gemma3" else 1e-9  # whose norms compute in float32
        torch.testing.assert_close(model(ids, use_cache=False).logits, exact, rtol=0, atol=near)
    assert errors[1] < 0.7 * errors[0]
    scale = settled["model.layers.0.self_attn.key_balance"]
    assert torch.equal(scale[:, :half], scale[:, half:])
    assert torch.equal(scale.log2(), scale.log2().round())  # no weight is rounded by it
    assert scale[:, 0].min() >= 4 * scale[:, 1:half].max()


@pytest.mark.parametrize("foreign", [False, True])
@torch.no_grad()
def test_positions_may_jump_in_a_cache(foreign):
    """Prompts padded on the right: each row goes on where its own tokens end."""
    model = attach(tiny("llama"), scheme_for(tiny("llama"), center="mean"))
    ids, lengths, more = some_ids(2, 12), [9, 5], 3
    cache = None if foreign else PackedKVCache(model)
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    known = {} if cache is None else cache_argument(model, cache)
    out = model(ids[:, :9], attention_mask=mask, use_cache=True, **known)
    again = cache_argument(model, getattr(out, "cache", None) or out.past_key_values) if foreign else known
    mask = torch.cat([mask, torch.ones(2, more, dtype=torch.long)], 1)
    places = torch.tensor(lengths)[:, None] + torch.arange(more)
    got = model(ids[:, 9:], attention_mask=mask, position_ids=places, use_cache=True, **again).logits
    for row, n in enumerate(lengths):
        alone = model(torch.cat([ids[row, :n], ids[row, 9:]])[None], use_cache=False).logits[:, n:]
        torch.testing.assert_close(got[row : row + 1], alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_rows_of_a_cache_take_their_positions_with_them():
    model = attach(tiny("llama"), scheme_for(tiny("llama"), center="mean"))
    ids, places = some_ids(2, 9), torch.stack([torch.arange(9), torch.arange(20, 29)])
    after, following = torch.cat([places, places[:, -1:] + 1], 1), ids[:, :1].repeat(2, 1)
    for move, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        cache = PackedKVCache(model)
        model(ids, position_ids=places, **cache_argument(model, cache))
        move(cache)
        got = model(following[: len(rows)], position_ids=places[rows, -1:] + 1, **cache_argument(model, cache)).logits
        alone = [torch.cat([ids[row], following[i]])[None] for i, row in enumerate(rows)]
        single = [
            model(one, position_ids=after[row][None], use_cache=False).logits[:, -1:]
            for one, row in zip(alone, rows, strict=True)
        ]
        torch.testing.assert_close(got, torch.cat(single), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_copy_of_a_filled_cache_goes_on_by_itself():
    model = attach(tiny("llama"), scheme_for(tiny("llama"), center="mean"))
    ids = some_ids(1, 12)
    cache = PackedKVCache(model)
    model(ids[:, :8], **cache_argument(model, cache))
    for _ in range(2):
        again = model(ids[:, 8:], **cache_argument(model, copy.deepcopy(cache))).logits
        torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 8:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_cache_filled_without_positions_is_refused():
    model, ids = tiny("llama"), some_ids(1, 12)
    out = model(ids, use_cache=True)
    attach(model, scheme_for(model, center="mean"))
    with pytest.raises(PaleyError, match="fill a new cache"):
        model(ids, **cache_argument(model, getattr(out, "cache", None) or out.past_key_values))


@pytest.mark.parametrize("center", ["mean", "bias"])
def test_what_a_model_cannot_be_centred_by_is_refused(center):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    scheme = AttentionScheme(ActivationScheme("uint4"), center_keys=center)
    with pytest.raises(PaleyError, match="depends on the length"):
        attach_schemes(
            LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)), {"model.layers.0.self_attn": scheme}
        )
    if center == "bias":
        for name in ("llama", "qwen3"):
            with pytest.raises(PaleyError, match="has none in this model"):
                attach(tiny(name), scheme_for(tiny(name), center="bias"))


def test_a_model_has_just_the_mean_keys_that_its_schemes_ask_for():
    for center, parts in (("mean", MEAN_KEYS[:1]), (True, MEAN_KEYS[1:]), ("bias", ()), (False, ())):
        model = attach(tiny("qwen2"), scheme_for(tiny("qwen2"), center=center))
        names = [f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in parts]
        assert [name for name, _ in model.named_buffers() if name.endswith(MEAN_KEYS)] == names
        assert ("key_offset" in str(model.state_dict().keys())) == (center == "mean")
        assert scheme_for(model, center=center).needs_data == bool(parts)
