"""What every family with a row keeps, in float64 unless transformers itself goes through float32."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from family_configs import CONFIGS, plain_attention
from paley.arch import FAMILIES, Norm
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, Schemes
from paley.core.transforms import Transform
from paley.model.adapter import Adapter
from paley.model.attention import attach_schemes
from paley.model.capture import BlockRunner
from paley.model.compared import ComparedBlock
from paley.model.key_statistics import KeySettler
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.wrapping import wrap_
from paley.ops import attention as op

IDS = torch.randint(4, 61, (3, 23), generator=torch.Generator().manual_seed(0))


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[kind](num_key_value_heads=2, attn_implementation=plain_attention(kind))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    row = FAMILIES[kind]
    if any(row.routers()):
        model.config._experts_implementation = "eager"
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.3 + (1.0 - row.gain_offset if "norm" in name else 0.0)
    return model


def attach(model: PreTrainedModel, keys: str | None = "uint3", center: bool | str = False, **more: bool) -> None:
    """The same scheme for every attention."""
    adapter = Adapter(model)
    width = adapter.sites.of("keys")[0].shape[1]
    rounding = None if keys is None else ActivationScheme(keys)
    values = None if keys is None else ActivationScheme("int8")
    scheme = AttentionScheme(rounding, values, Transform(width, width, width, 3), center_keys=center, **more)
    attach_schemes(model, {block.attention: scheme for block in adapter.blocks})


class Exact(BlockRunner):
    """In the model's own type."""

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.adapter.embedding(ids)


def settle(model: PreTrainedModel) -> None:
    """Measures mean keys, and balances keys, of a model with schemes, which are away meanwhile."""
    runner = Exact(Adapter(model), 2)
    schemes = {block.attention: runner.adapter.module(block.attention).kv_scheme for block in runner.adapter.blocks}
    for name in schemes:
        runner.adapter.module(name).kv_scheme = None
    settler = KeySettler(runner, IDS, schemes)
    for block in runner.adapter.blocks:
        settler.settle(block, {})
    for name, scheme in schemes.items():
        runner.adapter.module(name).kv_scheme = scheme


def near(kind: str) -> float:
    """Norms, and the eager attention of transformers, go through float32."""
    return 2e-4 if FAMILIES[kind].attention_softcap or "norm" in str(FAMILIES[kind].block) else 1e-9


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_one_by_one_are_the_model(kind):
    model = tiny(kind)
    runner = Exact(Adapter(model), batch=2)
    got = runner.logits(runner.suffix(0, runner.embed(IDS)))
    torch.testing.assert_close(got, model(IDS, use_cache=False).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_our_attention_is_the_familys_with_and_without_a_cache(kind):
    model = tiny(kind)
    wanted = model(IDS, use_cache=False).logits
    attach(model, keys=None)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
    cache = PackedKVCache(model)
    pieces = [model(part, **cache_argument(model, cache)).logits for part in IDS.split([9, 1, 1, 12], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_packed_cache_reads_as_one_forward_does(kind):
    model = tiny(kind)
    attach(model, center="mean")
    settle(model)
    whole = model(IDS, use_cache=False).logits
    cache = PackedKVCache(model)
    pieces = [model(part, **cache_argument(model, cache)).logits for part in IDS.split([9, 1, 1, 12], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_centred_and_balanced_keys_change_nothing_if_nothing_is_rounded(kind, monkeypatch):
    model = tiny(kind)
    attach(model, keys=None)
    exact = model(IDS, use_cache=False).logits
    clips = FAMILIES[kind].clips(model.config)  # which forbids scaling keys before they are clipped
    attach(model, keys="uint2", center="mean", balance_keys=not clips)
    settle(model)
    block = model.model.layers[0].self_attn
    assert block.key_offset.abs().max() > 0.01
    assert (model(IDS, use_cache=False).logits - exact).abs().max() > 0.01
    monkeypatch.setattr(
        op.rounding, "round_trip", lambda x, scheme, dtype=None, transform=None: transform.apply(x) if transform else x
    )
    torch.testing.assert_close(model(IDS, use_cache=False).logits, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_the_mean_is_that_of_what_rope_turns(kind):
    """As the last module that makes keys gives them: RoPE of any kind is undone."""
    model, row = tiny(kind), FAMILIES[kind]
    maker, made, block = row.maker(row.keys), [], model.model.layers[1]
    hook = block.get_submodule(maker.path).register_forward_hook(lambda m, args, out: made.append(out))
    attach(model, keys=None)
    model(IDS, use_cache=False)
    hook.remove()
    keys = made[0] if isinstance(maker, Norm) else made[0][..., row.rows(row.keys, model.config)]
    if keys.dim() == 4:  # [batch, tokens, heads, head_dim], or with heads first
        keys = keys if keys.shape[1] == IDS.shape[1] else keys.transpose(1, 2)
    keys = keys.reshape(*IDS.shape, 2, -1)
    attach(model, center="mean")
    settle(model)
    wanted = torch.stack([keys[:, 0].mean(0), keys[:, 1:].mean((0, 1))])
    torch.testing.assert_close(block.self_attn.key_offset.double(), wanted.half().double(), rtol=2e-3, atol=1e-4)


def test_only_layers_with_rope_turn_the_mean():
    model = tiny("smollm3")
    attach(model, center="mean")
    settle(model)
    first, second = (block.self_attn for block in model.model.layers)
    first.key_offset.fill_(1.0)
    second.key_offset.fill_(1.0)
    like = torch.zeros(1, 2, IDS.shape[1], first.head_dim, dtype=torch.float64)
    bases = [attention.key_base.new(like)[0, 0] for attention in (first, second)]
    assert not torch.allclose(bases[0][1], bases[0][5])  # turned with the place
    torch.testing.assert_close(bases[1][1], bases[1][5])


def test_clipped_keys_are_not_balanced_by_folding():
    row = replace(FAMILIES["llama"], clip="clip_qkv")
    config = CONFIGS["llama"](num_key_value_heads=2)
    assert not row.clips(config)
    assert row.values_rotate(config)
    config.clip_qkv = 3.0
    assert row.clips(config)
    assert not row.values_rotate(config)


@torch.no_grad()
def test_the_residual_target_counts_what_a_block_adds():
    """Granite multiplies what attention adds: its output must make up for a wrong stream divided by that."""
    adapter = Adapter(tiny("granite", torch.float32))
    kept = {site.name: LinearScheme() for site in adapter.sites.weights}
    wrap_(adapter, Schemes(kept, {block.attention: AttentionScheme() for block in adapter.blocks}))
    block, runner = adapter.blocks[0], BlockRunner(adapter, batch=3)
    original = runner.embed(IDS)
    hidden = original + torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    (site,) = (s for s in block.inputs() if s.name.endswith("o_input"))
    made = []
    linear, alike = block.module.self_attn.o_proj, (adapter.sites[site.readers[0]],)
    hook = linear.register_forward_hook(lambda module, args, out: made.append((args[0], out)))
    for states in (hidden, original):
        runner.run(block.module, 0, states)
    hook.remove()
    (x, _), (_, y) = made
    times = adapter.model.config.residual_multiplier
    wanted = (original + times * y - hidden) / times
    scale = (original + times * y).square().mean(-1, keepdim=True).rsqrt()
    with ComparedBlock(
        runner, block, copy.deepcopy(block.module), hidden, original, [site], "residual_stream", lambda _, h: h
    ) as both:
        read = both.statistics(site, [alike])[alike]
    aim = (wanted * scale).flatten(0, 1).T @ (x * scale).flatten(0, 1)
    assert float((read.aim - aim).norm() / aim.norm()) < 0.01
