"""Noise at a site: its size, its effect, and that nothing is left of it."""

from __future__ import annotations

import pytest
import torch
from test_calibrate import IDS, linear_of, make_schemes, small_adapter
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence, rel_error
from paley.core.schemes import LinearScheme, Rotation, WeightScheme
from paley.core.transforms import Transform
from paley.methods.nearest import quantize_nearest
from paley.methods.sensitivity import fit_slope, measure_slopes, noise_levels
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.fold import fold_norms_
from paley.model.loading import open_source
from paley.model.rotation import rotate_
from paley.model.sensitivity import KINDS, NoiseProbe, add_noise, noise_sites
from paley.model.wrapping import wrap_

DOWN = "model.layers.1.mlp.down_proj"
METRICS = ("kl", "perplexity")
OUTER = ("model.embed_tokens", "lm_head")


def make(adapter=None, metric="kl", kinds=KINDS, ids=IDS, **settings) -> NoiseProbe:
    return NoiseProbe(BlockRunner(adapter or small_adapter(), batch=4), ids, metric=metric, kinds=kinds, **settings)


def qwen3_adapter() -> Adapter:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="sdpa", initializer_range=0.2,
    )  # fmt: skip
    return Adapter(Qwen3ForCausalLM(config).eval().requires_grad_(False))


def perplexity(logits: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).exp())


def test_sites_are_named_as_elsewhere():
    sites = noise_sites(small_adapter().sites, KINDS)
    first = {name.removeprefix("model.layers.0."): site for name, site in sites.items() if site.block == 0}
    linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert list(first) == [
        "attn_input", *linears[:3], "keys", "values", "o_input", linears[3], "mlp_input", *linears[4:6], "down_input",
        linears[6],
    ]  # fmt: skip
    assert [name for name, site in sites.items() if site.block is None] == ["model.embed_tokens", "lm_head"]
    assert first["mlp.down_proj"].numel == 32 * 48
    assert first["down_input"].numel == 48
    assert first["keys"].numel == first["values"].numel == 16  # 2 heads of 8
    assert {site.kind for site in noise_sites(small_adapter().sites, ["keys"]).values()} == {"keys"}


def test_a_tied_pair_is_one_weight():
    sites = noise_sites(small_adapter(tie_word_embeddings=True).sites, ["weight"])
    assert [name for name, site in sites.items() if site.block is None] == ["model.embed_tokens"]


@pytest.mark.parametrize("shape", [(200 * 300,), (400, 2, 64)])
def test_noise_has_the_size_asked_for(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    noisy = add_noise(x, 0.3, torch.Generator().manual_seed(2))
    assert rel_error(x, noisy) == pytest.approx(0.09, rel=0.03)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("end", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_noise_in_a_weight_is_as_large_as_the_rows_it_goes_into(end, rotated):
    """Rounding has a scale for each row; what is to be rotated gets one size for the rows that will be mixed."""
    adapter = small_adapter()
    linear = linear_of(adapter, 0, end)
    linear.weight.data *= torch.linspace(0.5, 4, linear.out_features)[:, None]
    (name,) = (site.name for site in adapter.blocks[0].linears() if site.name.endswith(end))
    before, probe, errors = linear.weight.clone(), make(adapter, rotated=rotated), 0
    for draw in range(40):
        with probe.noise(name, 0.3, draw):
            errors += (linear.weight - before).square().sum(1) / 40
    mixed = {"v_proj": 8, "o_proj": 32, "down_proj": 32}.get(end, 1) if rotated else 1
    sizes = before.square().sum(1).view(-1, mixed).mean(1).repeat_interleave(mixed)
    assert (errors / sizes).tolist() == pytest.approx([0.09] * len(sizes), rel=0.2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("site", [DOWN, "model.layers.0.self_attn.k_proj", "model.layers.1.attn_input",
                                  "model.layers.0.keys", "model.layers.1.values", *OUTER])  # fmt: skip
def test_the_suffix_gives_what_the_whole_model_gives(site, metric):
    probe = make(metric=metric)
    model = probe.runner.adapter.model
    original = model(IDS, use_cache=False).logits[:, :-1]
    probe.runner.batch = len(IDS)  # the run-time noise of all batches in one
    probe = NoiseProbe(probe.runner, IDS, metric=metric, kinds=KINDS)
    with probe.noise(site, 0.2, 3):
        logits = model(IDS, use_cache=False).logits[:, :-1]
    if metric == "kl":
        want = float(kl_divergence(original, logits).mean())
    else:
        with probe.noise(site, -0.2, 3):
            mirrored = model(IDS, use_cache=False).logits[:, :-1]
        plain, one, other = (perplexity(x) for x in (original, logits, mirrored))
        want = (one + other) / 2 - plain
    assert probe.delta(site, 0.2, 3) == pytest.approx(want, abs=1e-5 * max(1, probe.baseline))
    assert want != 0


def test_the_model_is_as_before_bit_for_bit():
    probe = make()
    model = probe.runner.adapter.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(IDS, use_cache=False).logits
    for site in probe.sites:
        assert probe.delta(site, 0.3, 0) > 0
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS, use_cache=False).logits, logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("site", [DOWN, "model.layers.1.down_input", "model.layers.1.keys", *OUTER])
def test_a_trial_that_fails_leaves_nothing_behind(site):
    probe = make()
    weight = probe.runner.adapter.module(site if site in OUTER else DOWN).weight
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), probe.noise(site, 0.3, 0):
        raise KeyboardInterrupt
    assert torch.equal(weight, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in probe.runner.adapter.model.modules())


def test_results_do_not_depend_on_the_order():
    probe = make()
    trials = [(site, draw) for site in probe.sites for draw in (0, 1)]
    forwards = {trial: probe.delta(trial[0], 0.2, trial[1]) for trial in trials}
    backwards = {trial: probe.delta(trial[0], 0.2, trial[1]) for trial in reversed(trials)}
    alone = make(kinds=["weight"])
    assert forwards == backwards
    assert alone.delta(DOWN, 0.2, 1) == forwards[DOWN, 1] != forwards[DOWN, 0]
    assert make(seed=1).delta(DOWN, 0.2, 1) != forwards[DOWN, 1]


def test_the_mirror_image_takes_away_what_is_proportional_to_t():
    """Of a loss a t + b t^2 only b t^2 is left: halving t leaves a quarter, not a half."""
    probe = make(metric="perplexity", kinds=["weight"])
    slope, halved = (probe.delta(DOWN, t, 0) / t**2 for t in (0.02, 0.01))
    assert halved == pytest.approx(slope, rel=0.1)


def test_only_the_suffix_is_run():
    probe = make()
    probe.runner.work = 0
    probe.delta("model.layers.0.attn_input", 0.1, 0)
    assert probe.runner.work == 2 * IDS.numel()
    probe.delta(DOWN, 0.1, 0)
    probe.delta(DOWN, 0.2, 1)
    assert probe.runner.work == (2 + 1 + 2) * IDS.numel()  # the prefix moved on by one block, once


def test_linears_that_share_an_input_share_its_noise():
    probe = make()
    adapter, seen = probe.runner.adapter, {}
    with probe.noise("model.layers.0.attn_input", 0.3, 0):
        handles = [
            linear_of(adapter, 0, f"{end}_proj").register_forward_hook(
                lambda m, args, out, end=end: seen.update({end: args[0]})
            )
            for end in "qkv"
        ]
        adapter.model(IDS)
        for handle in handles:
            handle.remove()
    assert torch.equal(seen["q"], seen["k"])
    assert torch.equal(seen["q"], seen["v"])


@pytest.mark.parametrize("make_adapter", [small_adapter, qwen3_adapter])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_keys_and_values_are_off_by_t_in_each_head_where_attention_reads_them(monkeypatch, make_adapter, kind):
    """Noise goes in before RoPE, which turns it with the keys: relative to them it stays what it was."""
    probe = make(make_adapter())
    caught: list[torch.Tensor] = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def catch(module, query, key, value, mask, **kwargs):
        if module.layer_idx == 0:
            caught.append(key if kind == "keys" else value)
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: catch)
    ids = IDS.repeat(10, 1)
    probe.runner.adapter.model(ids)
    with probe.noise(f"model.layers.0.{kind}", 0.3, 0):
        probe.runner.adapter.model(ids)
    clean, noisy = caught
    errors = (noisy - clean).square().sum(-1) / clean.square().sum(-1)  # [batch, heads, tokens]
    assert errors.mean((0, 2)).tolist() == pytest.approx([0.09] * 2, rel=0.05)


def test_what_is_going_to_be_rotated_has_the_slopes_of_the_rotated_model():
    plain, rotated = small_adapter(), small_adapter()
    for adapter in (plain, rotated):
        for block in adapter.blocks:
            for site in block.linears():  # rows that differ, which a rotation of the columns evens out
                weight = adapter.module(site.module).weight
                weight.data *= torch.linspace(0.2, 1.5, len(weight))[:, None]
    rotate_(rotated, Rotation(Transform(32, 32, 32, seed=1), Transform(8, 8, 8, seed=2)), {})
    ids, ratios = IDS.repeat(2, 1), []
    for seed in range(2):
        plain_slopes, rotated_slopes = (
            measure_slopes(list(probe.sites), probe.delta, agreement=None)
            for probe in (
                make(plain, kinds=["weight"], ids=ids, seed=seed, rotated=True),
                make(rotated, kinds=["weight"], ids=ids, seed=seed),
            )
        )
        ratios.append([rotated_slopes[name].alpha / slope.alpha for name, slope in plain_slopes.items()])
    means = torch.tensor(ratios).mean(0)
    assert means.sub(1).abs().max() < 0.3
    assert means.mean() == pytest.approx(1, abs=0.05)


def test_a_quantized_model_is_refused():
    adapter = small_adapter()
    wrap_(adapter, make_schemes(adapter, LinearScheme()))
    with pytest.raises(PaleyError, match=r"q_proj: is a QuantLinear; measure the original"):
        make(adapter)


def test_unknown_kinds_are_refused():
    with pytest.raises(PaleyError, match="unknown kind 'weights' of sites; did you mean 'weight'"):
        make(kinds=["weights"])
    with pytest.raises(PaleyError, match="no kind of sites is given"):
        make(kinds=[])


@pytest.mark.parametrize("tied", [False, True])
def test_noise_in_the_head_does_not_reach_the_logits_it_is_compared_with(tied):
    """The KL is that of a noisy head to the head as it was, also if the original's logits are not kept."""
    adapter = small_adapter(tie_word_embeddings=tied)
    site = "model.embed_tokens" if tied else "lm_head"
    probe = make(adapter, kinds=["weight"])
    clean = adapter.model(IDS, use_cache=False).logits[:, :-1]
    with probe.noise(site, 0.3, 1):
        want = float(kl_divergence(clean, adapter.model(IDS, use_cache=False).logits[:, :-1]).mean())
    for _ in range(2):
        probe._objective._kept.clear()
        assert probe.delta(site, 0.3, 1) == pytest.approx(want, rel=1e-4)
    assert want > 1e-3


def test_noise_in_the_head_runs_no_block_and_in_the_embedding_all():
    probe = make(kinds=["weight"])
    probe.runner.work = 0
    probe.delta("lm_head", 0.1, 0)
    assert probe.runner.work == 0
    probe.delta("model.embed_tokens", 0.1, 0)
    assert probe.runner.work == 2 * IDS.numel()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("site", OUTER)
def test_rows_of_embedding_and_head_get_noise_of_their_own_size(site, rotated):
    """No rotation mixes tokens."""
    adapter = small_adapter()
    weight = adapter.module(site).weight
    weight.data *= torch.linspace(0.5, 4, len(weight))[:, None]
    before, probe, errors = weight.clone(), make(adapter, rotated=rotated, kinds=["weight"]), 0
    for draw in range(40):
        with probe.noise(site, 0.3, draw):
            errors += (weight - before).square().sum(1) / 40
    assert (errors / before.square().sum(1)).tolist() == pytest.approx([0.09] * 40, rel=0.2)


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_without_a_loss_is_refused(metric):
    adapter = small_adapter()
    adapter.head.weight.data[3] = torch.nan
    with pytest.raises(PaleyError, match=f"the {metric} of the model as it is comes out as nan"):
        make(adapter, metric)


def test_a_perplexity_without_end_is_named():
    adapter = small_adapter()
    adapter.head.weight.data *= 1000
    with pytest.raises(PaleyError, match="the perplexity of the model as it is comes out as inf"):
        make(adapter, "perplexity")


@pytest.mark.slow
def test_slopes_of_noise_predict_the_kl_of_rounding(shared_dir):
    """A trained model: noise in its folded weights foretells what 4 bits do to single layers of the rotated one."""
    source = open_source(shared_dir / "models" / "tinystories-656k-llama")
    text = (shared_dir / "data" / "text" / "tinystories_train_head_ajay.txt").read_text(encoding="utf-8")
    tokenized = source.tokenizer()(text[:8000], add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(tokenized[: 8 * 128]).view(8, 128)
    folded, rotated = Adapter(source.load()), Adapter(source.load())
    fold_norms_(folded)
    probe, times = make(folded, kinds=["weight"], ids=ids, rotated=True), noise_levels(5)
    slopes = {
        site: fit_slope([(t * t, probe.delta(site, t, draw)) for draw, t in enumerate(times)])
        for site in probe.sites
        if probe.sites[site].kind == "linear"
    }
    rotate_(rotated, Rotation(Transform(128, 128, 128, seed=1), Transform(16, 16, 16, seed=2)), {})
    original = rotated.model(ids).logits
    for site in sorted(slopes, key=lambda name: -slopes[name].alpha)[:6]:
        weight = rotated.module(site).weight
        before = weight.clone()
        after = quantize_nearest(before, WeightScheme("gauss4", group_size=32, method="nearest")).dequantize()
        weight.data.copy_(after)
        measured = float(kl_divergence(original, rotated.model(ids).logits)[:, :-1].mean())
        weight.data.copy_(before)
        predicted = slopes[site].alpha * rel_error(before, after)
        assert 1 / 1.5 < measured / predicted < 1.5, site
