"""A budget of the cache goes by what rounding loses of the model's own keys and values, measured once and exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.pipeline import curve
from paley.pipeline import decide as deciding
from paley.pipeline.curve import accuracy_size_curve
from paley.pipeline.decide import decide, measure_errors_for
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import measure_sensitivity
from paley.pipeline.texts import Texts
from paley.recipe import apply_settings, preset

NO_TEXTS = Texts(None, None, None)


class Heard(Monitor):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A model with an outlier channel in its keys, and its slopes."""
    folder = tmp_path_factory.mktemp("activations") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[7] *= 30
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    source = open_source(folder)
    kinds = ("weight", "input", "keys", "values")
    slopes = measure_sensitivity(source, source="random", sequences=2, seq_len=24, levels=3, kinds=kinds)
    return SimpleNamespace(source=source, slopes=slopes)


def recipe(*settings, name="higgs-w4a16kv4"):
    return apply_settings(preset(name), list(settings))


def test_outliers_in_keys_are_seen_and_nothing_is_left_to_chance(made):
    wanted = resolve(made.source, recipe("budget={kv: 6, source: random}", "rotate=none"))
    found = [measure_errors_for(wanted, made.slopes, Monitor(), "cpu") for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] is not None
    of = {place[1]: e for (place, s), e in found[0].table.items() if (s.grid.name, s.clip_ratio) == ("uint4", 1.0)}
    assert of["keys"] > 1.2 * of["values"]
    plans = [decide(wanted, NO_TEXTS, None, Monitor(), "cpu", made.slopes) for _ in range(2)]
    assert plans[0] == plans[1]
    chosen = [((n, f), getattr(a, f)) for n, a in plans[0].schemes.attentions.items() for f in ("keys", "values")]
    for place, scheme in chosen:
        rivals = [e for (at, s), e in found[0].table.items() if (at, s.grid) == (place, scheme.grid)]
        assert found[0](place, scheme, 32) == min(rivals)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("higgs-w4a4kv4", ()), ("rtn-w4a4kv4", ()), ("w4a4kv4", ("search.method=none",))],
)
def test_inputs_are_measured_under_the_recipes_rotations(made, name, settings):
    wanted = recipe("budget={kv: 6, inputs: 5, source: random}", *settings, name=name)
    problem = resolve(made.source, wanted)
    slopes = made.slopes.model_copy(update={"folded": problem.folded})
    found = measure_errors_for(problem, slopes, Monitor(), "cpu")
    assert found is not None
    assert {place[1] for place, _ in found.table} == {"keys", "values", "input"}
    assert all(0 < error < 1 for error in found.table.values())


def test_a_budget_for_inputs_alone_leaves_the_cache_as_it_is(made):
    problem = resolve(made.source, recipe("budget.source=random", name="w4a4.5kv4"))
    slopes = made.slopes.model_copy(update={"folded": problem.folded})
    plan = decide(problem, NO_TEXTS, None, Monitor(), "cpu", slopes)
    assert plan.schemes.attentions == problem.schemes.attentions
    inputs = [plan.schemes.linears[site.name].input for site in made.source.sites.of("linear")]
    assert len({scheme.grid for scheme in inputs}) > 1
    assert all(scheme.weight == plan.schemes.linears[name].weight for name, scheme in problem.schemes.linears.items())


def test_weights_alone_need_no_pass(made, monkeypatch):
    monkeypatch.setattr(deciding, "measure_errors", None)
    problem = resolve(made.source, recipe("budget={weights: 4}"))
    plan = decide(problem, NO_TEXTS, None, Monitor(), "cpu", made.slopes)
    assert plan.predicted_loss


def test_several_budgets_are_measured_once(made, monkeypatch):
    calls, measure = [], deciding.measure_errors
    monkeypatch.setattr(deciding, "measure_errors", lambda *args: calls.append(1) or measure(*args))
    heard = Heard()
    wanted = recipe("budget={weights: 4, kv: 6}")
    points = accuracy_size_curve(made.source.path, wanted, [2.5, 3.5, 4.5], sensitivity=made.slopes, monitor=heard)
    assert (len(points), len(calls)) == (3, 1)
    assert heard.notes == ["budget: below 3 bits losses grow faster than predicted (2.5)"]
    problem = resolve(made.source, recipe("budget={weights: 3.5, kv: 6}"))
    alone = decide(problem, NO_TEXTS, None, heard, "cpu", made.slopes)
    assert points[1].predicted_loss == alone.predicted_loss


def test_a_text_that_is_not_here_is_replaced_and_named(made):
    text = made.slopes.text.model_copy(update={"source": "/nowhere/text.txt"})
    slopes, heard = made.slopes.model_copy(update={"text": text}), Heard()
    decide(resolve(made.source, recipe("budget={kv: 6}")), NO_TEXTS, None, heard, "cpu", slopes)
    (note,) = heard.notes
    assert "text that the model samples instead (/nowhere/text.txt" in note


@pytest.mark.parametrize("bits", [float("nan"), float("inf")])
def test_a_curve_needs_finite_budgets(made, bits):
    with pytest.raises(PaleyError, match=r"budget\.weights: must be a finite number, got"):
        curve.accuracy_size_curve(made.source.path, recipe("budget={weights: 4}"), [3.0, bits], sensitivity=made.slopes)
