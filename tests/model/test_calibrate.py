import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.model.adapter import Adapter
from paley.model.calibrate import BlockQuantizer, wrap_
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.linear import QuantLinear


def small_adapter():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.data = torch.randn_like(p) * 0.2
    return Adapter(model)


def slots(adapter, bits=3, inputs=True):
    linear = LinearScheme(WeightScheme(f"gauss{bits}"), ActivationScheme("odd4") if inputs else None)
    linears = {path: linear for block in adapter.blocks for _, path in block.linears()}
    kv = ActivationScheme("uint4")
    return linears, {block.path("attention"): AttentionScheme(kv, kv) for block in adapter.blocks}


IDS = torch.randint(0, 40, (6, 32), generator=torch.Generator().manual_seed(1))


def run(adapter, compensate="residual_stream", bits=3):
    linears, attentions = slots(adapter, bits)
    wrap_(adapter, linears, attentions)
    quantizer = BlockQuantizer(BlockRunner(adapter, batch=2), IDS, linears, attentions, compensate=compensate)
    return quantizer, [quantizer.quantize(i) for i in range(2)]


def test_block_runner_is_the_model():
    adapter = small_adapter()
    runner = BlockRunner(adapter, batch=4)
    got = runner.logits(runner.suffix(0, runner.embed(IDS)))
    torch.testing.assert_close(got, adapter.model(IDS, use_cache=False).logits)
    assert runner.work == 2 * IDS.numel()


def test_wrapping_changes_nothing():
    adapter = small_adapter()
    before = adapter.model(IDS).logits
    linears, attentions = slots(adapter)
    wrap_(adapter, linears, attentions)
    torch.testing.assert_close(adapter.model(IDS).logits, before)


def test_hidden_states_follow_both_models():
    original, adapter = small_adapter(), small_adapter()
    quantizer, reports = run(adapter)
    runner = BlockRunner(original)
    want = runner.suffix(0, runner.embed(IDS))
    torch.testing.assert_close(quantizer.original, want)
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
    linears, attentions = slots(restored)
    wrap_(restored, linears, attentions)
    quantizer = BlockQuantizer(BlockRunner(restored, batch=2), IDS, linears, attentions, compensate="residual_stream")
    first = quantizer.restore(0, {r.name: r.quantized for r in reports[0]})
    second = quantizer.quantize(1)
    assert [r.rel_error for r in first] == [r.rel_error for r in reports[0]]
    for made, again in zip(reports[1], second, strict=True):
        assert torch.equal(made.quantized.codes, again.quantized.codes)
    assert torch.equal(adapter.model(IDS).logits, restored.model(IDS).logits)


@pytest.mark.parametrize("role", ["q", "down"])
def test_a_linear_may_stay_as_it_is(role):
    adapter = small_adapter()
    path = adapter.blocks[0].path(role)
    before = copy.deepcopy(adapter.model.get_submodule(path).weight)
    linears, attentions = slots(adapter)
    linears[path] = LinearScheme(None, ActivationScheme("int8"))
    wrap_(adapter, linears, attentions)
    quantizer = BlockQuantizer(BlockRunner(adapter, 2), IDS, linears, attentions, compensate="plain")
    assert path not in [r.name for r in quantizer.quantize(0)]
    kept = adapter.model.get_submodule(path)
    assert isinstance(kept, QuantLinear)
    assert kept.slot.input == ActivationScheme("int8")
    assert torch.equal(kept.weight, before)


def test_outliers_are_the_loudest_columns_and_shared_by_what_reads_them():
    adapter = small_adapter()
    with torch.no_grad():
        for block in adapter.blocks:
            block.module.input_layernorm.weight[[5, 11]] = 40.0
    scheme = WeightScheme("free2", 16, scale_search="em_diagonal")
    linears, attentions = slots(adapter)
    linears = {name: LinearScheme(scheme, ActivationScheme("uint4", group_size=16), outliers=2) for name in linears}
    wrap_(adapter, linears, attentions)
    quantizer = BlockQuantizer(BlockRunner(adapter, batch=2), IDS, linears, attentions, compensate="residual_stream")
    for block in adapter.blocks:
        reports = quantizer.quantize(block.index)
        for role in ("q", "k", "v"):
            assert block.part(role).outlier_columns.tolist() == [5, 11]
        made = {report.name: report.quantized for report in reports}
        assert all(q.outliers is not None and len(q.outliers.columns) == 2 for q in made.values())
    assert adapter.model(IDS).logits.isfinite().all()

    again = small_adapter()
    with torch.no_grad():
        for block in again.blocks:
            block.module.input_layernorm.weight[[5, 11]] = 40.0
    wrap_(again, linears, attentions)
    second = BlockQuantizer(BlockRunner(again, batch=2), IDS, linears, attentions, compensate="residual_stream")
    first = {p: adapter.model.get_submodule(p).quantized() for p in linears}
    for block in again.blocks:
        second.restore(block.index, {path: first[path] for _, path in block.linears()})
    assert torch.equal(second.hidden, quantizer.hidden)


def test_outliers_need_text_and_columns_to_spare():
    for ids, count, complaint in ((None, 2, "outliers need calibration text"), (IDS, 32, "outliers=32 must be fewer")):
        adapter = small_adapter()
        linears, attentions = slots(adapter)
        scheme = WeightScheme("int2", method="nearest", scale_search="absmax")
        linears = {name: LinearScheme(scheme, outliers=count) for name in linears}
        wrap_(adapter, linears, attentions)
        with pytest.raises(PaleyError, match=complaint):
            BlockQuantizer(BlockRunner(adapter), ids, linears, attentions, compensate="plain").quantize(0)


def test_each_rotation_has_outliers_of_its_own():
    adapter, turned = small_adapter(), Transform(32, 32, 32, seed=3)
    linears, attentions = slots(adapter, inputs=False)
    scheme = WeightScheme("int2", method="nearest", scale_search="absmax")
    chosen = LinearScheme(scheme, transform=turned, outliers=2)
    linears = {name: chosen if name.endswith(("k_proj", "v_proj")) else LinearScheme() for name in linears}
    wrap_(adapter, linears, attentions)
    quantizer = BlockQuantizer(BlockRunner(adapter, batch=2), IDS, linears, attentions, compensate="plain")
    block, seen = adapter.blocks[0], []
    with capture_inputs({"k": block.part("k")}, lambda _, x: seen.append(turned.apply(x))):
        adapter.model(IDS)
    quantizer.quantize(0)
    loudest = torch.cat(seen).square().sum(0).topk(2).indices.sort().values
    assert block.part("k").outlier_columns.tolist() == loudest.tolist()
