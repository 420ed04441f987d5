"""Scores of models without a row: of their own logits, whatever is between the blocks, the head and these."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from every_type import save_type, tiny_model
from paley import hf
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.data import blocks_from_ids
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.eval.tasks import log_likelihoods
from paley.model.adapter import Adapter
from paley.model.attention import attach_schemes
from paley.model.decoder import ModelDecoder, TextContext
from paley.model.pieces import Pieces, pieces_of
from paley.pipeline import quantize
from paley.recipe import apply_settings, preset

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


PLAIN = ("test=null", "hadamard=16", "center_keys=false", "balance_keys=false", "diagonal=false")

# Types whose scan forgets its state, which counts positions from each piece's beginning, with no cache, encoders; and
# those that are right, with and without states.
IN_PIECES = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), Pieces(at_once=False)),
    "bamba": Pieces(positions=True),
    **dict.fromkeys(("rwkv", "minimax", "xlnet", "recurrent_gemma", "bert"), Pieces(cache=False)),
    **dict.fromkeys(("gpt2", "lfm2", "falcon_h1", "qwen3_5_text", "mamba2", "granitemoehybrid"), Pieces()),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_PIECES)
@torch.no_grad()
def test_a_text_in_pieces_is_the_text(kind, caplog):
    model, ids = tiny_model(kind), torch.randint(5, 127, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted, text = model(ids, use_cache=False).logits[0], ids[0].tolist()
    decoder = ModelDecoder(model)
    context = decoder.start()
    for tokens in (text[:14], text[14:]):
        (logits,) = decoder.read([(context, tokens)])
        last = model(ids[:, : context.length], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, last, rtol=0, atol=1e-4 * float(wanted.std()))
    # Three answers to a question are scored as one forward scores each.
    texts = [(tuple(text[:14]), tuple(text[at : at + 4])) for at in (14, 16, 18)]
    for (question, answer), (score, _) in zip(texts, log_likelihoods(model, texts), strict=True):
        rows = model(torch.tensor([question + answer[:-1]]), use_cache=False).logits[0, 13:].log_softmax(-1)
        assert score == pytest.approx(float(rows.gather(-1, torch.tensor(answer)[:, None]).sum()), abs=1e-4)
    assert pieces_of(model) == IN_PIECES[kind]
    said = [record for record in caplog.records if record.name == "paley.model.pieces"]
    assert len(said) == (not IN_PIECES[kind].cache or not IN_PIECES[kind].at_once)


@pytest.mark.parametrize(("kind", "wanted"), [("jamba", Pieces(at_once=False)), ("bamba", Pieces(positions=True))])
@torch.no_grad()
def test_a_quantized_cache_is_scored_as_one_forward_scores_it(kind, wanted):
    model = tiny_model(kind)
    scheme = AttentionScheme(ActivationScheme("int8"), ActivationScheme("int8"))
    attach_schemes(model, {site.name.removesuffix(".keys"): scheme for site in Adapter(model).sites.of("keys")})
    logits = model(IDS, use_cache=False).logits[:, :-1]  # attention rounds keys and values itself
    by_hand = float(cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
    assert evaluate(model, BLOCKS, chunk=10).nll == pytest.approx(by_hand, abs=2e-5)
    assert pieces_of(model) == wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("lfm2", Pieces()), ("qwen3_5_moe_text", Pieces()), ("mamba", Pieces(at_once=False)),
     ("bamba", Pieces(positions=True))],
)  # fmt: skip
@pytest.mark.parametrize("how", ["int4 inputs", "bfloat16"])
def test_what_rounding_makes_of_small_differences_hides_no_fault(kind, wanted, how, tmp_path):
    if how == "bfloat16":
        assert pieces_of(tiny_model(kind).bfloat16()) == wanted
        return
    save_type(kind, tmp_path / "model")
    recipe = apply_settings(preset("w4a4kv4"), ["weights.method=nearest", *PLAIN])
    quantize(tmp_path / "model", recipe, output=tmp_path / "out")
    assert pieces_of(hf.load(tmp_path / "out")) == wanted
