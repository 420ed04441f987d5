import dataclasses
import json
import math
import statistics

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme
from paley.core.transforms import Transform
from paley.data import TokenBlocks, blocks_from_ids
from paley.eval import perplexity
from paley.eval.perplexity import EvalResult, evaluate
from paley.eval.reference import Reference
from paley.eval.sampling import sample_documents
from paley.eval.scoring import scores
from paley.model.attention import attach_schemes
from paley.model.kv_cache import PackedKV
from paley.model.linear import QuantLinear

VOCAB, HEAD_DIM, LAYERS, KV_HEADS = 61, 8, 2, 2
SLOT = AttentionScheme(
    ActivationScheme("int3"), ActivationScheme("uint3"), Transform(HEAD_DIM, HEAD_DIM, HEAD_DIM, seed=3)
)


def tiny(seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    """Random, with weights large enough that attention matters and the predictions are sharp."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def with_quantized_cache(slot: AttentionScheme = SLOT) -> LlamaForCausalLM:
    model = tiny()
    attach_schemes(model, {f"model.layers.{i}.self_attn": slot for i in range(LAYERS)})
    return model


def random_blocks(count: int = 5, seq_len: int = 23, role: str = "test", seed: int = 5) -> TokenBlocks:
    ids = torch.randint(VOCAB, (count, seq_len), generator=torch.Generator().manual_seed(seed))
    return blocks_from_ids(ids, role, "random")


@torch.no_grad()
def nll_by_hand(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """Each sequence's mean, from one long forward in float64."""
    log_p = model(ids, use_cache=False).logits.double().log_softmax(-1)
    return [
        statistics.mean(-float(log_p[i, t, ids[i, t + 1]]) for t in range(ids.shape[1] - 1)) for i in range(len(ids))
    ]


def perturbed() -> LlamaForCausalLM:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1.1
    return model


@pytest.mark.parametrize(("chunk", "batch"), [(128, 8), (5, 2), (1, 1), (22, 3)])
def test_perplexity_is_the_cross_entropy_by_hand(chunk, batch):
    model, blocks = tiny(), random_blocks()
    result = evaluate(model, blocks, chunk=chunk, batch=batch)
    means = nll_by_hand(model, blocks.ids)
    assert result.nll == pytest.approx(statistics.mean(means), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(statistics.mean(means)), rel=1e-6)
    stderr = statistics.stdev(means) / math.sqrt(5)
    assert result.nll_stderr == pytest.approx(stderr, rel=1e-5)
    assert result.perplexity_stderr == pytest.approx(result.perplexity * stderr, rel=1e-5)
    assert (result.sequences, result.tokens) == (5, 5 * 22)
    assert (result.source, result.sha256) == ("random", blocks.sha256)
    assert {result.gap, result.kl, result.kl_stderr, result.top1_agreement, result.reference_nll} == {None}


def test_comparison_is_the_one_by_hand():
    original, model, blocks = tiny(), perturbed(), random_blocks()
    result = evaluate(model, blocks, Reference.of(original, blocks, batch=2), chunk=7, batch=3)
    with torch.no_grad():
        p, q = (m(blocks.ids).logits[:, :-1].double().log_softmax(-1) for m in (original, model))
    kl = [float(x) for x in (p.exp() * (p - q)).sum(-1).mean(1)]
    same = [float(x) for x in (p.argmax(-1) == q.argmax(-1)).double().mean(1)]
    before, after = nll_by_hand(original, blocks.ids), nll_by_hand(model, blocks.ids)
    gap = [b - a for a, b in zip(before, after, strict=True)]
    assert min(kl) > 1e-4
    assert 0 < statistics.mean(same) < 1
    assert result.reference_nll == pytest.approx(statistics.mean(before), abs=1e-6)
    for name, mean, values in (
        ("gap", result.gap, gap),
        ("kl", result.kl, kl),
        ("top1", result.top1_agreement, same),
    ):
        assert mean == pytest.approx(statistics.mean(values), abs=1e-6), name
        expected = statistics.stdev(values) / math.sqrt(len(values))  # paired: of the differences, for gap
        assert getattr(result, f"{name}_stderr") == pytest.approx(expected, rel=1e-4), name
    assert result.gap_stderr < result.nll_stderr / 2  # pairing pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identical_model_has_no_loss(dtype, tmp_path):
    blocks = random_blocks()
    Reference.of(tiny().to(dtype), blocks).save(tmp_path / "reference.safetensors")
    result = evaluate(tiny().to(dtype), blocks, Reference.load(tmp_path / "reference.safetensors", blocks))
    assert abs(result.kl) < 1e-6
    assert result.top1_agreement == 1
    assert result.gap == 0
    assert result.gap_stderr == result.top1_stderr == 0


def test_a_quantized_cache_is_read_back_and_costs_what_fake_quantization_costs(tiny_tokenizer):
    ids = sample_documents(tiny(), tiny_tokenizer, count=12, tokens=40, seed=1)  # where the original is best
    blocks = blocks_from_ids(ids, "test", "self")
    reference = Reference.of(tiny(), blocks)
    exact, model = evaluate(tiny(), blocks, reference), with_quantized_cache()
    expected = statistics.mean(nll_by_hand(model, ids))  # one forward; attention rounds keys and values itself
    for chunk, batch in ((128, 8), (7, 5), (1, 12)):
        result = evaluate(model, blocks, reference, chunk=chunk, batch=batch)
        assert result.nll == pytest.approx(expected, abs=2e-5)
        assert result.gap > 5 * result.gap_stderr > 0
        assert result.kl > 0.01
        assert result.top1_agreement < exact.top1_agreement == 1


@pytest.mark.parametrize("slot", [SLOT, AttentionScheme(keys=SLOT.keys), AttentionScheme(values=SLOT.values)])
def test_it_is_the_codes_that_are_read(slot, monkeypatch):
    model, blocks = with_quantized_cache(slot), random_blocks()
    honest = evaluate(model, blocks, chunk=5)
    read = []

    def forget(self: PackedKV, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        read.append(self.shape[2])
        return torch.zeros(self.shape, dtype=dtype)

    monkeypatch.setattr(PackedKV, "dequantize", forget)
    assert abs(evaluate(model, blocks, chunk=5, batch=5).nll - honest.nll) > 1e-3
    sides = LAYERS * ((slot.keys is not None) + (slot.values is not None))
    assert sorted(read) == sorted([5, 10, 15, 20, 22] * sides)  # a chunk, and all tokens before it


def test_a_slot_that_quantizes_nothing_needs_no_cache():
    blocks = random_blocks()
    model = with_quantized_cache(AttentionScheme(transform=SLOT.transform))
    assert evaluate(model, blocks) == evaluate(tiny(), blocks)


def test_cache_bytes():
    vectors = LAYERS * KV_HEADS
    keys, values = 3 + 2, 3 + 2 + 1  # codes, a float16 scale, a zero point
    plain = HEAD_DIM * 2  # at 16 bits, whatever was computed with
    for slot, expected in (
        (AttentionScheme(), plain + plain),
        (SLOT, keys + values),
        (AttentionScheme(keys=SLOT.keys), keys + plain),
        (AttentionScheme(values=SLOT.values), plain + values),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            model = with_quantized_cache(slot).to(dtype)
            result = evaluate(model, random_blocks(), batch=2, chunk=4)
            assert result.kv_cache_bytes_per_token == vectors * expected, (slot, dtype)
            assert result.kv_cache_bytes_per_token_at_16_bits == vectors * 2 * plain
    assert evaluate(tiny(), random_blocks(seq_len=3)).kv_cache_bytes_per_token == vectors * 2 * plain


def test_cache_bytes_of_a_model_that_is_quantized_in_one_layer():
    model = tiny()
    attach_schemes(model, {"model.layers.1.self_attn": SLOT})
    expected = KV_HEADS * (2 * HEAD_DIM * 2 + (3 + 2) + (3 + 2 + 1))
    assert evaluate(model, random_blocks(), chunk=5).kv_cache_bytes_per_token == expected


@pytest.mark.parametrize("make", [tiny, with_quantized_cache])
@pytest.mark.parametrize("whole_head", [False, True])
def test_logits_in_tiles_give_the_same_scores(make, whole_head, monkeypatch):
    model, blocks = make(), random_blocks(count=3)
    reference = Reference.of(perturbed(), blocks)
    want = evaluate(model, blocks, reference, chunk=10, batch=2)
    monkeypatch.setattr("paley.eval.scoring.TOKENS", 7)
    monkeypatch.setattr("paley.eval.scoring.VOCABULARY", 9)  # of 61: seven slices, the last of seven tokens
    seen = []
    if whole_head:  # a head that is no plain matrix is computed at once, for a few tokens
        model.lm_head = nn.Sequential(model.lm_head)
        model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    got = evaluate(model, blocks, reference, chunk=10, batch=2)
    assert {tokens for tokens, _ in seen} <= {1, 2, 3, 4, 5, 6, 7}
    assert bool(seen) == whole_head
    for name in ("nll", "kl", "kl_stderr", "top1_agreement", "gap"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5, abs=1e-6), name


def test_scores_are_those_by_hand_in_any_slices():
    g = torch.Generator().manual_seed(0)
    a, b = 30 * torch.randn(2, 6, 50, generator=g)
    a[0, 7] = a[1, 7] = 900  # e^900 is no float64
    targets = torch.tensor([0, 49, 7, 20, 21, 3])
    p, q = b.double().log_softmax(-1), a.double().log_softmax(-1)
    want = torch.stack(
        [-q.gather(-1, targets[:, None])[:, 0], (p.exp() * (p - q)).sum(-1), (a.argmax(-1) == b.argmax(-1)).double()]
    )
    for width in (1, 7, 21, 50, 64):

        def cut(x, width=width):
            return ((i, x[:, i : i + width].clone()) for i in range(0, 50, width))

        torch.testing.assert_close(scores(cut(a), cut(b), targets), want.float(), rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(scores(cut(a), None, targets), want[:1].float(), rtol=2e-6, atol=2e-5)


def test_progress_counts_sequences():
    calls = []
    evaluate(tiny(), random_blocks(), batch=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_one_sequence_has_no_standard_error():
    blocks = random_blocks(count=1)
    result = evaluate(perturbed(), blocks, Reference.of(tiny(), blocks))
    assert result.kl > 0
    stderrs = {name: value for name, value in result.to_dict().items() if name.endswith("stderr")}
    assert set(stderrs.values()) == {None}
    assert len(stderrs) == 5


def test_standard_error_of_a_planted_example():
    assert perplexity._mean_and_stderr(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, 0.645497))
    assert perplexity._mean_and_stderr(torch.tensor([7.0])) == (7.0, None)
    assert perplexity._mean_and_stderr(torch.tensor([7.0, math.inf])) == (math.inf, None)


def test_the_result_is_json_even_where_perplexity_overflows():
    model = tiny()
    model.lm_head.weight.data *= 1e4
    result = evaluate(model, random_blocks())
    assert result.perplexity == math.inf
    assert result.perplexity_stderr is None
    parsed = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert parsed["perplexity"] == "inf"
    assert parsed["nll"] == result.nll > 700
    assert parsed.keys() == {field.name for field in dataclasses.fields(EvalResult)}


@pytest.mark.parametrize("role", ["search", "calibration"])
def test_only_test_blocks_give_a_score(role):
    with pytest.raises(PaleyError, match=f"have role '{role}', this needs role 'test'"):
        evaluate(tiny(), random_blocks(role=role))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [2, 8])
def test_logits_that_are_not_finite_name_the_first_sequence(bad, batch):
    model, ids = tiny(), torch.full((6, 9), 3)
    ids[4, 0] = ids[3, 6] = 7
    model.model.embed_tokens.weight.data[7, 0] = bad
    blocks = blocks_from_ids(ids, "test", "planted")
    for run in (
        lambda: evaluate(model, blocks, batch=batch, chunk=4),
        lambda: Reference.of(model, blocks, batch=batch),
    ):
        with pytest.raises(PaleyError, match=r"planted: .* NaN or infinite, first in sequence 3 \(counted"):
            run()


def test_one_infinite_logit_is_enough():
    model, blocks = tiny(), random_blocks()
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([60]), -math.inf))
    with pytest.raises(PaleyError, match="first in sequence 0"):
        evaluate(model, blocks)


def test_what_cannot_be_evaluated_is_refused():
    model = tiny()
    with pytest.raises(PaleyError, match="chunk=0"):
        evaluate(model, random_blocks(), chunk=0)
    with pytest.raises(PaleyError, match="batch=0"):
        Reference.of(model, random_blocks(), batch=0)
    with pytest.raises(PaleyError, match="blocks of one token predict nothing"):
        evaluate(model, random_blocks(seq_len=1))
    with pytest.raises(PaleyError, match=r"token ids are in \[1, 60\], .* vocabulary has 50 tokens"):
        evaluate(tiny(vocab=50), random_blocks())
    with pytest.raises(PaleyError, match="in training mode"):
        evaluate(model.train(), random_blocks())


def test_a_reference_for_other_ids_or_another_vocabulary_is_refused(tmp_path):
    blocks, other = random_blocks(), random_blocks(seed=6)
    reference = Reference.of(tiny(), blocks)
    with pytest.raises(PaleyError, match=r"not for .* of random"):
        evaluate(tiny(), other, reference)
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    with pytest.raises(PaleyError, match=r"reference\.safetensors: made for token ids \[5, 23\]"):
        Reference.load(path, other)
    with pytest.raises(PaleyError, match="vocabulary has 61 tokens, this model's 70"):
        evaluate(tiny(vocab=70), blocks, reference)


def test_a_reference_is_of_an_unquantized_model():
    model = tiny()
    slot = LinearScheme(input=ActivationScheme("int8"))
    model.lm_head = QuantLinear.from_linear(model.lm_head, slot, None)
    with pytest.raises(PaleyError, match=r"lm_head is a QuantLinear.*give the unquantized model"):
        Reference.of(model, random_blocks())
    blocks = random_blocks()
    assert evaluate(model, blocks, Reference.of(tiny(), blocks)).kl > 0  # as what is compared it may be so
