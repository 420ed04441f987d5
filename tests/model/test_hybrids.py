"""Models with states beside attention: every linear is found, and the cache of those layers that have attention.

Other types without a row, too: their attention is replaced, and reads a packed cache.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from every_type import tiny_model
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.core.transforms import Transform
from paley.model.attention import attach_schemes
from paley.model.kv_cache import PackedKVCache, PackedKVLayer, cache_argument
from paley.model.walk import sites_of
from paley.ops import attention as op

# Qwen 3.5, Granite 4, LFM2, Falcon H1, and others of each kind; in a "hybrid" layer attention and states are side by
# side.
HYBRIDS = [
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "lfm2", "lfm2_moe", "falcon_h1", "jamba",
    "nemotron_h", "olmo_hybrid",
]  # fmt: skip
PLAIN = ["gpt_neox", "gpt2", "cohere2", "opt", "phi"]  # attention alone, of other makes than LLaMA's
IDS = torch.randint(5, 127, (2, 23), generator=torch.Generator().manual_seed(0))


def attach(model: nn.Module, keys: str = "int4") -> None:
    schemes = {}
    for site in sites_of(model).of("keys"):
        width = site.shape[1]
        transform = Transform(width, width, width & -width, 3)
        attention = model.get_submodule(site.name.removesuffix(".keys"))
        same = getattr(attention, "v_head_dim", width) == width
        schemes[site.name.removesuffix(".keys")] = AttentionScheme(
            ActivationScheme(keys), ActivationScheme("int8"), transform if same else None
        )
    attach_schemes(model, schemes)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_every_linear_and_the_cache_of_every_attention_are_sites(kind):
    model = tiny_model(kind)
    found, types = sites_of(model), model.config.layer_types
    attending = [i for i, what in enumerate(types) if what in ("full_attention", "hybrid")]
    assert attending
    assert len(attending) < len(types) or "hybrid" in types
    assert [site.block for site in found.of("keys")] == [site.block for site in found.of("values")] == attending
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != found.head.name}
    assert linears <= {site.name for site in found.of("linear")} | found.kept.keys()
    assert len(found.of("linear")) > 2 * len(found.kept)


@pytest.mark.parametrize("kind", HYBRIDS + PLAIN)
@torch.no_grad()
def test_our_attention_is_the_models_if_nothing_is_rounded(kind, monkeypatch):
    model = tiny_model(kind)
    wanted = model(IDS, use_cache=False).logits
    attach(model)
    assert float((model(IDS, use_cache=False).logits - wanted).std() / wanted.std()) > 1e-4
    monkeypatch.setattr(
        op.rounding, "round_trip", lambda x, scheme, dtype=None, transform=None: transform.apply(x) if transform else x
    )
    torch.testing.assert_close(model(IDS, use_cache=False).logits, wanted, rtol=0, atol=1e-5 * float(wanted.std()))


@pytest.mark.parametrize("kind", HYBRIDS + PLAIN)
@torch.no_grad()
def test_a_packed_cache_reads_as_one_forward_does(kind):
    model = tiny_model(kind)
    attach(model)
    whole = model(IDS, use_cache=False).logits
    cache = PackedKVCache(model)
    assert sum(isinstance(layer, PackedKVLayer) for layer in cache.layers) == len(sites_of(model).of("keys"))
    pieces = [model(part, **cache_argument(model, cache)).logits for part in IDS.split([20, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4 * float(whole.std()))
    assert cache.nbytes > 0


@torch.no_grad()
def test_a_cache_with_states_beside_keys_begins_anew_and_cannot_go_back():
    model = tiny_model("falcon_h1")
    attach(model)
    cache = PackedKVCache(model)
    first = model(IDS, **cache_argument(model, cache)).logits
    with pytest.raises(PaleyError, match="a layer with states cannot go back"):
        cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    torch.testing.assert_close(model(IDS, **cache_argument(model, cache)).logits, first)


@pytest.mark.parametrize(
    "kind", ["deepseek_v2", "deepseek_v3", "kimi_linear", "longcat_flash", "minimax", "zamba2", "inkling2_text"]
)
@torch.no_grad()
def test_a_cache_that_attention_does_not_read_itself_stays_as_it_is(kind):
    """Latents that are expanded behind the cache, a family's own, one module in several layers, sinks of tokens."""
    model = tiny_model(kind)
    assert not sites_of(model).of("keys", "values")
    cache = PackedKVCache(model)
    assert not any(isinstance(layer, PackedKVLayer) for layer in cache.layers)
    if kind != "minimax":
        whole = model(IDS, use_cache=False).logits
        pieces = [model(part, **cache_argument(model, cache)).logits for part in IDS.split([20, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4 * float(whole.std()))
