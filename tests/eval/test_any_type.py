"""Scores of models without a row: of their own logits, whatever is between the blocks, the head and these."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from every_type import tiny_model
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.data import blocks_from_ids
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.attention import attach_schemes
from paley.model.decoder import ModelDecoder, TextContext

IDS = torch.randint(5, 127, (3, 21), generator=torch.Generator().manual_seed(0))
BLOCKS = blocks_from_ids(IDS, "test", "some")
# No cache that can be packed; a bias of the head; factors and soft caps of logits; a transform, and a factor, before
# the head; states.
KINDS = {
    "gpt_neox": {}, "mamba": {}, "phi": {}, "gptj": {}, "cohere": {}, "granitemoe": {"logits_scaling": 8.0},
    "nanochat": {"final_logit_softcapping": 2.0}, "recurrent_gemma": {"logits_soft_cap": 1.5}, "bert": {},
    "minicpm3": {"dim_model_base": 16}, "falcon_h1": {"lm_head_multiplier": 0.3}, "opt": {}, "gpt2": {}, "bart": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_score_is_that_of_the_models_own_logits(kind, tmp_path):
    model = tiny_model(kind, **KINDS[kind])
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].float()
    reference = Reference.of(model, BLOCKS)
    reference.save(tmp_path / "reference.safetensors")
    scored = evaluate(model, BLOCKS, Reference.load(tmp_path / "reference.safetensors", BLOCKS))
    wanted = float(cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
    assert scored.nll == pytest.approx(wanted, rel=1e-5)
    assert scored.reference_nll == pytest.approx(wanted, rel=1e-5)
    assert scored.kl == pytest.approx(0, abs=1e-6)
    assert scored.kv_cache_bytes_per_token == 2 * sum(site.numel for site in Adapter(model).sites.of("keys", "values"))
    assert float(logits.std()) > 0.03


@torch.no_grad()
def test_logits_that_are_made_in_another_way_are_refused():
    model = tiny_model("gpt2")
    make = model.forward
    model.forward = lambda *args, **kwargs: (out := make(*args, **kwargs), setattr(out, "logits", out.logits**3))[0]
    with pytest.raises(PaleyError, match=r"'gpt2': its logits are not its head's outputs.*test=null"):
        evaluate(model, BLOCKS)


@pytest.mark.parametrize("kind", ["falcon_h1", "qwen3_5_text", "granitemoehybrid", "afmoe"])
@torch.no_grad()
def test_a_quantized_cache_takes_part(kind):
    model = tiny_model(kind)
    before = evaluate(model, BLOCKS)
    scheme = AttentionScheme(ActivationScheme("int8"), None)
    sites = Adapter(model).sites.of("keys")
    attach_schemes(model, {site.name.removesuffix(".keys"): scheme for site in sites})
    after = evaluate(model, BLOCKS, chunk=7)
    assert after.nll != before.nll
    assert after.nll == pytest.approx(before.nll, rel=0.02)
    bytes_of_keys = sum(site.shape[0] * (site.shape[1] + 2) for site in sites)  # and a scale for each head
    assert after.kv_cache_bytes_per_token == bytes_of_keys + before.kv_cache_bytes_per_token / 2


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["gpt2", "gpt_neox", "cohere2", "falcon_h1", "lfm2", "qwen3_5_text", "mamba", "rwkv", "minimax", "openai-gpt"],
)  # fmt: skip
@torch.no_grad()
def test_texts_are_decoded_and_a_reading_that_fails_is_undone(kind, quantized):
    """Plain layers of a cache, windows, states, packed layers beside them; families with other caches or none."""
    model = tiny_model(kind)
    sites = Adapter(model).sites.of("keys")
    if quantized:
        scheme = AttentionScheme(ActivationScheme("int8"), ActivationScheme("int8"))
        attach_schemes(model, {site.name.removesuffix(".keys"): scheme for site in sites})
    decoder, ids = ModelDecoder(model), IDS[0].tolist()
    wanted = model(IDS[:1], use_cache=False).logits[0]
    context = decoder.start()
    for tokens, last in ((ids[:19], 18), (ids[19:20], 19), (ids[20:], 20)):
        stops = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.read([(context, tokens)])
        stops.remove()
        (logits,) = decoder.read([(context, tokens)])
        torch.testing.assert_close(logits, wanted[last], rtol=0, atol=1e-4 * float(wanted.std()))
    assert context.length == 21
    if isinstance(context, TextContext):
        context.truncate(7)
        assert context.length == 7
