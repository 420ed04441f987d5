import copy
import gc
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.core.metrics import rel_error
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, Schemes, WeightScheme
from paley.core.transforms import Transform
from paley.methods.nearest import quantize_nearest
from paley.model.adapter import Adapter
from paley.model.calibrate import ModelQuantizer
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.embedding import QuantEmbedding
from paley.model.fold import rotate_input_
from paley.model.linear import QuantLinear
from paley.model.wrapping import wrap_
from paley.ops.matmul import CALIBRATION


def small_adapter(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", **settings,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.data = torch.randn_like(p) * 0.2
    return Adapter(model)


def make_schemes(adapter, linear=None, *, bits=3, inputs=True, **of):
    """The same for every linear, but for those whose names end as a key of `of`; embedding and head are kept."""
    linear = linear or LinearScheme(WeightScheme(f"gauss{bits}"), ActivationScheme("odd4") if inputs else None)
    linears = {
        site.name: next(
            (scheme for end, scheme in of.items() if site.name.endswith(end)),
            linear if site.kind == "linear" else LinearScheme(),
        )
        for site in adapter.sites.weights
    }
    kv = ActivationScheme("uint4")
    return Schemes(linears, {block.attention: AttentionScheme(kv, kv) for block in adapter.blocks})


def linear_of(adapter, block, end):
    """The linear of a block whose path ends so."""
    (site,) = (site for site in adapter.sites.of("linear", block=block) if site.name.endswith(end))
    return adapter.module(site.module)


IDS = torch.randint(0, 40, (6, 32), generator=torch.Generator().manual_seed(1))


def quantizer_of(adapter, schemes, ids=IDS, compensate="residual_stream"):
    wrap_(adapter, schemes)
    made = ModelQuantizer(BlockRunner(adapter, batch=2), ids, schemes, compensate=compensate)
    made.embedding({})
    return made


def run(adapter, compensate="residual_stream", bits=3):
    quantizer = quantizer_of(adapter, make_schemes(adapter, bits=bits), compensate=compensate)
    return quantizer, [quantizer.block(i, {}) for i in range(2)]


def test_block_runner_is_the_model():
    adapter = small_adapter()
    runner = BlockRunner(adapter, batch=4)
    got = runner.logits(runner.suffix(0, runner.embed(IDS)))
    torch.testing.assert_close(got, adapter.model(IDS, use_cache=False).logits)
    assert runner.work == 2 * IDS.numel()


def test_wrapping_changes_nothing():
    adapter = small_adapter()
    before = adapter.model(IDS).logits
    wrap_(adapter, make_schemes(adapter))
    torch.testing.assert_close(adapter.model(IDS).logits, before)


def test_layers_of_a_finished_block_are_freed_at_once():
    adapter = small_adapter()
    schemes = make_schemes(adapter)
    wrap_(adapter, schemes)
    quantizer = ModelQuantizer(BlockRunner(adapter, batch=2), IDS, schemes, compensate="residual_stream")
    quantizer.embedding({})
    gone = [weakref.ref(adapter.module(site.module)) for site in adapter.blocks[0].linears()]
    gc.disable()  # the collector may not run for many blocks
    try:
        quantizer.block(0, {})
        assert [ref() for ref in gone] == [None] * 7
    finally:
        gc.enable()


def test_hidden_states_follow_both_models():
    original, adapter = small_adapter(), small_adapter()
    quantizer, reports = run(adapter)
    runner = BlockRunner(original)
    want = runner.suffix(0, runner.embed(IDS))
    assert rel_error(want, quantizer.original) < 1e-4  # bfloat16 products made the one
    for linear in adapter.sites.of("linear"):
        adapter.module(linear.module).prepare_(CALIBRATION)
    runner = BlockRunner(adapter, batch=2)
    torch.testing.assert_close(quantizer.hidden, runner.suffix(0, runner.embed(IDS)))
    assert [len(r) for r in reports] == [7, 7]
    assert all(0 < r.rel_error < 1 for block in reports for r in block)


def test_the_aim_gets_closer_with_what_is_known():
    """plain -> quantized inputs -> residual stream: each knows more of the error and leaves less of it."""
    original = small_adapter()
    runner = BlockRunner(original)
    want = runner.suffix(0, runner.embed(IDS))
    errors = {}
    for compensate in ("plain", "quantized_inputs", "residual_stream"):
        quantizer, _ = run(small_adapter(), compensate)
        scale = want.square().mean(-1, keepdim=True).rsqrt()
        errors[compensate] = float(((quantizer.hidden - want) * scale).square().mean())
    assert errors["residual_stream"] < errors["quantized_inputs"] < errors["plain"]


def test_restoring_codes_is_the_same_as_making_them():
    adapter, restored = small_adapter(), small_adapter()
    _, reports = run(adapter)
    quantizer = quantizer_of(restored, make_schemes(restored))
    first = quantizer.block(0, {r.name: r.quantized for r in reports[0]})
    second = quantizer.block(1, {})
    assert [r.rel_error for r in first] == [r.rel_error for r in reports[0]]
    for made, again in zip(reports[1], second, strict=True):
        assert torch.equal(made.quantized.codes, again.quantized.codes)
    assert torch.equal(adapter.model(IDS).logits, restored.model(IDS).logits)


@pytest.mark.parametrize("end", ["q_proj", "down_proj"])
def test_a_linear_may_stay_as_it_is(end):
    adapter = small_adapter()
    before = copy.deepcopy(linear_of(adapter, 0, end).weight)
    schemes = make_schemes(adapter, **{end: LinearScheme(None, ActivationScheme("int8"))})
    quantizer = quantizer_of(adapter, schemes, compensate="plain")
    reports = [report.name for report in quantizer.block(0, {})]
    assert len(reports) == 6
    assert not any(name.endswith(end) for name in reports)
    kept = linear_of(adapter, 0, end)
    assert isinstance(kept, QuantLinear)
    assert kept.scheme.input == ActivationScheme("int8")
    assert torch.equal(kept.weight, before)


def loud_adapter():
    """Columns 5 and 11 of what q, k and v read are much larger than the others."""
    adapter = small_adapter()
    with torch.no_grad():
        for block in adapter.blocks:
            block.module.input_layernorm.weight[[5, 11]] = 40.0
    return adapter


def test_outliers_are_the_loudest_columns_and_shared_by_what_reads_them():
    adapter = loud_adapter()
    scheme = WeightScheme("free2", 16, scale_search="em_diagonal")
    schemes = make_schemes(adapter, LinearScheme(scheme, ActivationScheme("uint4", group_size=16), outliers=2))
    quantizer = quantizer_of(adapter, schemes)
    for block in adapter.blocks:
        reports = quantizer.block(block.index, {})
        for end in ("q_proj", "k_proj", "v_proj"):
            assert linear_of(adapter, block.index, end).outlier_columns.tolist() == [5, 11]
        made = {report.name: report.quantized for report in reports}
        assert all(q.outliers is not None and len(q.outliers.columns) == 2 for q in made.values())
    assert adapter.model(IDS).logits.isfinite().all()

    again = loud_adapter()
    second = quantizer_of(again, schemes)
    for block in again.blocks:
        second.block(block.index, {site.name: adapter.module(site.module).quantized() for site in block.linears()})
    assert torch.equal(second.hidden, quantizer.hidden)


def test_outliers_need_text_and_columns_to_spare():
    for ids, count, complaint in ((None, 2, "outliers need calibration text"), (IDS, 32, "outliers=32 must be fewer")):
        adapter = small_adapter()
        scheme = WeightScheme("int2", method="nearest", scale_search="absmax")
        schemes = make_schemes(adapter, LinearScheme(scheme, outliers=count))
        with pytest.raises(PaleyError, match=complaint):
            quantizer_of(adapter, schemes, ids, "plain").block(0, {})


def test_each_rotation_has_outliers_of_its_own():
    adapter, turned = small_adapter(), Transform(32, 32, 32, seed=3)
    scheme = WeightScheme("int2", method="nearest", scale_search="absmax")
    chosen = LinearScheme(scheme, transform=turned, outliers=2)
    schemes = make_schemes(adapter, LinearScheme(), k_proj=chosen, v_proj=chosen)
    quantizer, seen = quantizer_of(adapter, schemes, compensate="plain"), []
    with capture_inputs({"k": linear_of(adapter, 0, "k_proj")}, lambda _, x: seen.append(turned.apply(x))):
        adapter.model(IDS)
    quantizer.block(0, {})
    loudest = torch.cat(seen).square().sum(0).topk(2).indices.sort().values
    assert linear_of(adapter, 0, "k_proj").outlier_columns.tolist() == loudest.tolist()


CODED = LinearScheme(WeightScheme("int6", 16, method="nearest"), transform=Transform(32, 32, 16, seed=4))


@pytest.mark.parametrize("tied", [False, True])
def test_the_tokens_are_looked_up_in_the_coded_embedding(tied):
    """What comes after it sees its errors; the original's states stay exact."""
    adapter, exact = small_adapter(tie_word_embeddings=tied), small_adapter(tie_word_embeddings=tied).embedding
    rows = exact.weight.clone()
    schemes = make_schemes(adapter, LinearScheme(), embed_tokens=CODED)
    wrap_(adapter, schemes)
    quantizer = ModelQuantizer(BlockRunner(adapter, batch=2), IDS, schemes, compensate="plain")
    (report,) = quantizer.embedding({})
    assert report.name == "model.embed_tokens"
    assert isinstance(adapter.embedding, QuantEmbedding)
    assert torch.equal(quantizer.original, exact(IDS))
    assert torch.equal(quantizer.hidden, adapter.embedding(IDS))
    lost = (adapter.embedding(torch.arange(40)) - rows).square().sum() / rows.square().sum()
    assert 0 < lost < 1e-3
    assert report.rel_error == pytest.approx(float(lost), rel=1e-3)


def test_a_tied_head_multiplies_by_the_codes_of_the_embedding():
    adapter = small_adapter(tie_word_embeddings=True)
    exact = adapter.model(IDS).logits
    quantizer = quantizer_of(adapter, make_schemes(adapter, LinearScheme(), embed_tokens=CODED))
    assert quantizer.head({}) == []
    assert isinstance(adapter.head, QuantLinear)
    for part in ("codes", "scales"):
        assert getattr(adapter.head, part) is getattr(adapter.embedding, part)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    rows = adapter.embedding(torch.arange(40))  # turned back
    torch.testing.assert_close(adapter.head(hidden), hidden @ rows.T, rtol=1e-4, atol=1e-4)
    assert (adapter.model(IDS).logits - exact).square().mean() < 0.01 * exact.square().mean()


def head_quantizer(scheme, known=None):
    """A model of which the head alone is quantized, its quantizer at the head, and the head's inputs and weight."""
    adapter = small_adapter()
    weight = adapter.head.weight.clone()
    if scheme.transform is not None:
        rotate_input_(adapter.head, scheme.transform)
    quantizer = quantizer_of(adapter, make_schemes(adapter, LinearScheme(), lm_head=scheme))
    for block in adapter.blocks:
        quantizer.block(block.index, {})
    reports = quantizer.head(known or {})
    return adapter, reports, adapter.norm(quantizer.hidden).flatten(0, 1), weight


@pytest.mark.parametrize("transform", [None, Transform(32, 32, 16, seed=4)])
def test_a_head_is_calibrated_on_what_it_reads(transform):
    lost = {}
    for method in ("nearest", "gptq"):
        scheme = LinearScheme(WeightScheme("int3", method=method), transform=transform)
        adapter, (report,), x, weight = head_quantizer(scheme)
        assert report.name == "lm_head"
        assert isinstance(adapter.head, QuantLinear)
        torch.testing.assert_close(adapter.head(x), adapter.head.round_input(x) @ adapter.head.dequantize().T)
        lost[method] = float((adapter.head(x) - x @ weight.T).square().mean())
    assert lost["gptq"] < 0.8 * lost["nearest"]


def test_an_untied_head_is_turned_as_it_is_rounded(monkeypatch):
    """Some rows at a time, from the weight as the model has it; again with the codes that it made."""
    transform = Transform(32, 48, 16, seed=4)
    scheme = LinearScheme(WeightScheme("int4", method="nearest"), transform=transform)
    monkeypatch.setattr("paley.methods.nearest._CHUNK", 7 * 32)
    known, x = {}, torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        adapter = small_adapter()
        turned = transform.apply(adapter.head.weight.double()).float()
        schemes = make_schemes(adapter, LinearScheme(), lm_head=scheme)
        (report,) = ModelQuantizer(BlockRunner(adapter), None, schemes, compensate="plain").head(known)
        expected = quantize_nearest(turned, scheme.weight)
        assert torch.equal(report.quantized.codes, expected.codes)
        assert report.rel_error == pytest.approx(rel_error(turned, expected.dequantize()), rel=1e-5)
        torch.testing.assert_close(adapter.head(x), adapter.head.round_input(x) @ expected.dequantize().T)
        known = {report.name: report.quantized}


def test_a_replaced_linear_lets_go_of_its_weight():
    adapter = small_adapter()
    quantizer = quantizer_of(adapter, make_schemes(adapter, LinearScheme(WeightScheme("int4"))))
    linear = adapter.module("model.layers.0.mlp.down_proj")
    assert linear.weight is not None
    quantizer.block(0, {})
    assert linear.weight is None


def test_known_codes_of_embedding_and_head_are_taken(monkeypatch):
    scheme = LinearScheme(WeightScheme("int3"))
    adapter, (report,), *_ = head_quantizer(scheme)
    again, (taken,), *_ = head_quantizer(scheme, {report.name: report.quantized})
    assert taken.quantized is report.quantized
    assert torch.equal(again.head.dequantize(), adapter.head.dequantize())

    made, restored = small_adapter(), small_adapter()
    schemes = make_schemes(made, LinearScheme(), embed_tokens=CODED)
    monkeypatch.setattr("paley.methods.nearest._CHUNK", 7 * 32)  # rows come in parts
    reports = []
    for model in (made, restored):
        wrap_(model, schemes)
        quantizer = ModelQuantizer(BlockRunner(model), IDS, schemes, compensate="plain")
        reports += quantizer.embedding({r.name: r.quantized for r in reports})
        monkeypatch.setattr("paley.methods.nearest.quantize_nearest", None)  # nothing is rounded afresh
    assert torch.equal(made.embedding.dequantize(), restored.embedding.dequantize())
    assert reports[0].rel_error == reports[1].rel_error > 0
