"""Budgets go by slopes behind diagonals and feedback: of the model as GPTQ sees it, folded or turned at run time."""

from __future__ import annotations

import pytest
import torch

from paley.core.errors import PaleyError
from paley.methods.statistics import InputStatistics
from paley.model.adapter import Adapter
from paley.model.capture import capture_inputs
from paley.model.loading import open_source
from paley.pipeline import decide as deciding
from paley.pipeline.curve import accuracy_size_curve
from paley.pipeline.decide import as_quantized
from paley.pipeline.execute import prepare_
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import measure_on
from paley.pipeline.texts import gather
from paley.recipe import Recipe, apply_settings, preset
from tiny_models import save_tiny

NAMES = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("slopes") / "model"
    return save_tiny(path, tiny_tokenizer, gains=True, intermediate_size=72)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(f"Story {n} of {n * n} things. " * 3 for n in range(200)))
    return file


def recipe(text, *settings: str) -> Recipe:
    sizes = [f"{part}.{what}" for part in ("calibration", "test") for what in ("sequences=8", "seq_len=48")]
    return apply_settings(
        preset("w4a16e16h16"), [f"calibration.source={text}", "budget={weights: 4, source: random}", *sizes, *settings]
    )


@pytest.mark.parametrize("how", ["folded", "online"])
def test_what_gptq_reads_is_what_gains_are_measured_on(folder, text, how):
    """The Gram matrices of a model that is prepared whole, as GPTQ gets it, give the same."""
    wanted = recipe(text, f"rotate={how}", "diagonal=false", "expand_mlp=0")
    problem = resolve(open_source(folder), wanted)
    texts = gather(wanted, problem.source)
    assert texts.calibration is not None
    slopes = measure_on(problem.source, texts.calibration, metric="kl", fold=problem.folded)
    scaled = as_quantized(problem, slopes, texts.calibration, Monitor(), "cpu")

    adapter = Adapter(problem.source.load())
    prepare_(problem, adapter)
    sums = {name: InputStatistics() for name in NAMES}
    linears = {name: adapter.module(name) for name in NAMES}

    def add(name: str, x: torch.Tensor) -> None:
        sums[name].add(linears[name].round_input(x))

    with torch.no_grad(), capture_inputs(linears, add):
        adapter.model(texts.calibration.ids)
    for name in NAMES:
        metric = sums[name].metric(sums[name].damping)
        gain = float(metric.spread.diagonal().double().pow(-2).mean() / metric.diagonal.mean())
        assert gain < 0.95
        assert scaled.slots[name].alpha / slopes.slots[name].alpha == pytest.approx(gain, rel=1e-3)
    assert scaled.slots["model.embed_tokens"] == slopes.slots["model.embed_tokens"]


def test_no_more_than_a_block_is_in_memory(folder, text, monkeypatch):
    problem = resolve(open_source(folder), recipe(text))
    calibration = gather(recipe(text), problem.source).calibration
    slopes = measure_on(problem.source, calibration, metric="kl", fold=problem.folded)
    held: list[int] = []
    walk = deciding.slope_gains

    def watched(runner, ids, linears, feedback, *, begin, end):
        def counted(block) -> None:
            begin(block)
            weights = (p for b in runner.adapter.blocks for p in b.module.parameters())
            held.append(sum(p.numel() for p in weights if p.device.type != "meta"))

        return walk(runner, ids, linears, feedback, begin=counted, end=end)

    monkeypatch.setattr(deciding, "slope_gains", watched)
    as_quantized(problem, slopes, calibration, Monitor(), "cpu")
    one = sum(p.numel() for p in Adapter(problem.source.load()).blocks[0].module.parameters())
    assert held == [one, one]


def test_a_curve_reads_no_text_without_feedback(folder, tmp_path):
    """Where nothing is calibrated by GPTQ, a text that is missing is none of its business; else it is asked for."""
    missing = f"calibration.source={tmp_path / 'missing.txt'}"
    budget = "budget={weights: 4, source: random, sequences: 2, seq_len: 24}"
    data_free = apply_settings(preset("higgs-4e16h16"), [missing, budget])
    assert len(accuracy_size_curve(folder, data_free, [3.5, 4.5])) == 2
    with pytest.raises(PaleyError, match=r"missing\.txt"):
        accuracy_size_curve(folder, apply_settings(preset("w4a16e16h16"), [missing, budget]), [3.5])
