"""A block in steps: the statistics are those of whole forwards, and the block is left as it was, whatever happens."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_calibrate import IDS, make_schemes, quantizer_of, small_adapter
from torch import nn

from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.methods.statistics import InputStatistics, Metric
from paley.model import steps
from paley.model.attention import _check_still
from paley.model.calibrate import ModelQuantizer
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.compared import ComparedBlock
from paley.model.keys import _see
from paley.ops.matmul import CALIBRATION

WEIGHT = WeightScheme("gauss3")
SCHEMES = {
    "all alike": {},
    "each of its own": {
        "k_proj": LinearScheme(WEIGHT, None),
        "v_proj": LinearScheme(WEIGHT, ActivationScheme("odd3")),
        "up_proj": LinearScheme(WeightScheme("int4", method="nearest"), ActivationScheme("odd4")),
    },
    "the first is kept": {"q_proj": LinearScheme(), "gate_proj": LinearScheme()},
}


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy without stops."""
    made = copy.deepcopy(module)
    for part in made.modules():
        part.__dict__.pop("forward", None)
        part._forward_pre_hooks.clear()
    return made


def rounded(x: torch.Tensor) -> torch.Tensor:
    """As values are before they are summed over tokens."""
    return x.bfloat16().double()


def expected(pair: ComparedBlock, runner: BlockRunner, site, compensate: str):
    """Gram matrix, and the float64 weight that meets the outputs best, from whole forwards up to the linear."""
    local, block, original = pair._block.local(site.module), plain_copy(pair._block.module), plain_copy(pair._reference)
    norm = pair._block.local(site.norm) if compensate == "residual_stream" and site.adds_to_stream else None
    gram, aim = 0, 0
    for batch in zip(pair._now._batches, pair._then._batches, strict=True):
        parts = []
        for module, hidden in zip((block, original), batch, strict=True):
            linear, seen = module.get_submodule(local), {}
            watched = {"input": linear} | ({} if norm is None else {"stream": module.get_submodule(norm)})
            with capture_inputs(watched, seen.__setitem__):
                runner.run(module, pair._block.index, hidden)
            made = linear.product.run(linear.product.encode(seen["input"]), seen["input"])
            parts.append((linear, linear.round_input(seen["input"]).double(), seen.get("stream"), made.double()))
        (_, x, stream, _), (linear, x_then, stream_then, y) = parts
        weight = linear.dequantize().double()
        scale = 1.0
        if norm is not None:
            bias = 0 if linear.bias is None else linear.bias.double()
            after = stream_then.double() + y + bias
            y, scale = after - stream - bias, after.square().mean(-1, keepdim=True).rsqrt()
        else:
            y = rounded(x_then) @ weight.T
        x, y = rounded(x * scale), y if norm is None else rounded(y * scale)
        gram, aim = gram + x.T @ x, aim + y.T @ x
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    target = weight if compensate == "plain" else torch.linalg.solve(gram + ridge, (aim + weight @ ridge).T).T
    return gram, target


@pytest.mark.parametrize("kept", [2**30, 0])
@pytest.mark.parametrize("compensate", ["plain", "quantized_inputs", "residual_stream"])
@pytest.mark.parametrize("of", SCHEMES)
def test_statistics_are_those_of_whole_forwards(of, compensate, kept, monkeypatch):
    monkeypatch.setattr(steps, "KEPT", kept)
    adapter = small_adapter(attention_bias=True, mlp_bias=True)
    for site in adapter.sites.of("linear"):
        adapter.module(site.module).bias.data = torch.randn(site.shape[0])
    quantizer = quantizer_of(adapter, make_schemes(adapter, **SCHEMES[of]), compensate=compensate)
    statistics, checked = ComparedBlock.statistics, []

    def check(self, site, groups):
        wanted = [expected(self, quantizer.runner, alike[0], compensate) for alike in groups]  # the original goes on
        sums = statistics(self, site, groups)
        for (alike, found), (gram, target) in zip(sums.items(), wanted, strict=True):
            torch.testing.assert_close(found.gram.double(), gram, rtol=1e-3, atol=3e-4 * float(gram.abs().max()))
            weight = self._reference.get_submodule(self._block.local(alike[0].module)).dequantize()
            torch.testing.assert_close(found.target(weight, 0.01).double(), target, rtol=0, atol=2e-3)
            checked.append(alike[0].name)
        return sums

    monkeypatch.setattr(ComparedBlock, "statistics", check)
    for index in range(2):
        quantizer.block(index, {})
    assert len(checked) == 2 * {"all alike": 4, "each of its own": 6, "the first is kept": 4}[of]
    for linear in adapter.sites.of("linear"):
        adapter.module(linear.module).prepare_(CALIBRATION)
    runner = BlockRunner(adapter, batch=2)
    assert torch.equal(quantizer.hidden, runner.suffix(0, runner.embed(IDS)))
    assert_clean(adapter)


def test_the_original_ends_where_nothing_more_is_wanted_of_it(monkeypatch):
    """It stands still no longer than its last input is compared; what it makes is that of a whole forward."""
    adapter = small_adapter()
    quantizer = quantizer_of(adapter, make_schemes(adapter))
    read, statistics, left = quantizer.original.clone(), ComparedBlock.statistics, []

    def count(self, site, groups):
        found = statistics(self, site, groups)
        left.append(sum(not one.dead for one in self._then._passes))
        if not left[-1]:
            assert torch.equal(self._then._out, quantizer.runner.run(plain_copy(self._reference), 0, read))
        return found

    monkeypatch.setattr(ComparedBlock, "statistics", count)
    quantizer.block(0, {})
    assert left[-1] == 0
    assert min(left[:-1]) == len(read.split(quantizer.runner.batch))


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """No forward is left standing still: nothing would ever free it."""
    begun = []

    class Watched(steps._Pass):
        def __init__(self, *given):
            super().__init__(*given)
            begun.append(weakref.ref(self))

    monkeypatch.setattr(steps, "_Pass", Watched)
    yield begun
    gc.collect()
    assert not [one for ref in begun if (one := ref()) is not None and not one.dead and one.gr_frame is not None]


def assert_clean(adapter):
    for name, module in adapter.model.named_modules():
        assert "forward" not in module.__dict__, name
        assert set(module._forward_pre_hooks.values()) <= {_check_still, _see}, name  # an attention's own
        shared = getattr(module, "shared_input", None)
        assert shared is None or shared._x is None, name


def test_a_stop_in_the_middle_leaves_a_model_that_runs(monkeypatch):
    adapter = small_adapter()
    quantizer, codes = quantizer_of(adapter, make_schemes(adapter)), ModelQuantizer._codes

    def interrupted(self, site, statistics):
        if site.name.endswith("o_proj"):
            raise KeyboardInterrupt
        return codes(self, site, statistics)

    monkeypatch.setattr(ModelQuantizer, "_codes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantizer.block(0, {})
    assert_clean(adapter)
    assert adapter.model(IDS, use_cache=False).logits.isfinite().all()


def test_an_error_of_the_forward_comes_out(monkeypatch):
    adapter = small_adapter()
    quantizer = quantizer_of(adapter, make_schemes(adapter))

    def broken(*_: object) -> None:
        raise MemoryError("no more")

    handle = adapter.blocks[0].module.mlp.register_forward_pre_hook(broken)
    with pytest.raises(MemoryError, match="no more"):
        quantizer.block(0, {})
    handle.remove()
    assert_clean(adapter)


def test_a_gram_matrix_is_whole_and_symmetric():
    x = torch.randn(50, 257, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics()
    statistics.add(x[:20])
    statistics.add(x[20:])
    assert torch.equal(statistics.gram, statistics.gram.T)
    torch.testing.assert_close(statistics.gram.double(), rounded(x).T @ rounded(x), rtol=1e-5, atol=1e-4)


def test_the_target_of_exact_inputs_is_the_weight_itself():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 300, generator=g) @ torch.randn(300, 300, generator=g)  # fewer tokens than columns
    weight, statistics = torch.randn(20, 300, generator=g), InputStatistics()
    statistics.add(x, x)
    assert float((statistics.target(weight, 0.01) - weight).abs().max()) < 1e-4


def test_spread_is_the_cholesky_factor_of_the_inverse():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(60, 40, generator=g).double()
    gram = root.T @ root + torch.eye(40)
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    torch.testing.assert_close(Metric(gram).spread.double(), expected, rtol=1e-5, atol=1e-6)
    order = torch.randperm(40, generator=g)
    ordered = torch.linalg.cholesky(torch.linalg.inv(gram[order][:, order]), upper=True)
    torch.testing.assert_close(Metric(gram).ordered(order).spread.double(), ordered, rtol=1e-5, atol=1e-6)
