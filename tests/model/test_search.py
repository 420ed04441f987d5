import pytest
import torch
from test_calibrate import IDS, make_schemes, small_adapter, wrap_

from paley.core.schemes import ActivationScheme
from paley.model.capture import BlockRunner
from paley.model.search import ClipSearch, knobs, quicken_
from paley.ops.matmul import CALIBRATION
from paley.recipe.models import Search


def make(**settings):
    adapter = small_adapter()
    schemes = make_schemes(adapter)
    runner = BlockRunner(adapter, batch=3)
    wrap_(adapter, schemes)
    reference = runner.suffix(0, runner.embed(IDS))
    runner.work = 0
    return ClipSearch(runner, IDS, reference, schemes, Search(**settings))


def test_the_papers_layout_and_ours():
    adapter = small_adapter()
    schemes = make_schemes(adapter)
    ours = [knob.kind for knob in knobs(adapter.sites, "shared", schemes)]
    assert ours == ["attn_input", "keys", "values", "o_input", "mlp_input", "down_input"] * 2
    paper = knobs(adapter.sites, "per_projection", schemes)
    assert [knob.kind for knob in paper] == ["q", "k", "v", "keys", "o", "gate", "up", "down"] * 2
    assert paper[2].caches == ("values",)  # the V cache shares v's number


def test_trials_rerun_only_the_suffix():
    search = make(start="from_fp", iterations=2)
    trials = []
    search.run(on_trial=trials.append)
    blocks = [2 if ".layers.0." in t.slot else 1 for t in trials]
    # Each trial costs the blocks from its own on; the prefix is advanced once.
    assert search.runner.work == (sum(blocks) + 1) * IDS.numel()


def test_the_papers_schedule_reruns_everything():
    search = make(schedule="paper", start="from_fp", iterations=1)
    trials = []
    search.run(on_trial=trials.append)
    assert search.runner.work == 2 * len(trials) * IDS.numel()
    assert {t.clip_ratio for t in trials} == {0.5, 0.25}


def test_cached_and_whole_evaluations_agree():
    ours, whole = make(iterations=1), make(iterations=1, schedule="paper")
    for search in (ours, whole):
        for knob in search.knobs.values():
            search._set(knob, None)
    for name in ours.knobs:
        a, b = (s._loss(s.knobs[name], 0.7) for s in (ours, whole))
        assert a == pytest.approx(b, rel=1e-4)


def test_gradual_from_fp_and_from_low_bit_leave_everything_quantized():
    for start in ("from_fp", "from_low_bit"):
        search = make(start=start, iterations=1)
        outcomes = search.run()
        assert list(outcomes) == list(search.knobs)
        adapter = search.runner.adapter
        for block in adapter.blocks:
            now = adapter.module(block.attention).kv_scheme
            assert now == search.attentions[block.attention]
            assert now.keys is not None
            assert now.values is not None
            for site in block.linears():
                found = adapter.module(site.module).scheme.input
                assert isinstance(found, ActivationScheme)
                assert found == search.linears[site.name].input


def test_from_low_bit_the_start_of_a_knob_is_where_the_last_one_ended():
    search, trials = make(start="from_low_bit", iterations=1), []
    outcomes = list(search.run(on_trial=trials.append).values())
    fresh = make(start="from_low_bit")
    starts = {knob.name: fresh._start(knob) for knob in fresh.knobs.values()}
    repeated = [t for t in trials if t.clip_ratio == starts[t.slot]]
    assert [t.slot for t in repeated] == ["model.layers.0.attn_input"]
    # What was not computed is what would have come out.
    last = search.knobs["model.layers.1.down_input"]
    search._set(last, starts[last.name])
    assert search._loss(last, starts[last.name]) == pytest.approx(outcomes[-2].loss, rel=1e-6)


def test_low_bit_never_ends_worse_than_it_started():
    search = make(start="from_low_bit", iterations=3, objective="kl")
    first = search.knobs["model.layers.0.attn_input"]
    for knob in search.knobs.values():
        search._set(knob, search._start(knob))
    before = search._loss(first, search._start(first))
    after = list(search.run().values())[-1].loss
    assert after <= before


def test_a_stopped_search_goes_on_and_ends_the_same():
    whole, trials = make(iterations=2), []
    outcomes = whole.run(on_trial=trials.append)
    resumed, more = make(iterations=2), []
    again = resumed.run(known=trials[:11], on_trial=more.append)
    assert more == trials[11:]
    assert again == outcomes
    assert resumed.linears == whole.linears


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_objective_of_the_untouched_model(objective):
    search = make(objective=objective)
    for knob in search.knobs.values():
        search._set(knob, None)
    nothing = search.knobs["model.layers.0.attn_input"]
    search.linears = {k: v.__class__(v.weight, None, v.transform) for k, v in search.linears.items()}
    search._set = lambda knob, clip: None
    loss = search._loss(nothing, 1.0)
    logits = search.runner.adapter.model(IDS).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    assert loss == pytest.approx(0.0 if objective == "kl" else float(plain.exp()), abs=1e-4)


def test_a_search_multiplies_as_calibration_does():
    adapter = small_adapter()
    wrap_(adapter, make_schemes(adapter))
    names, head, before = list(adapter.model.state_dict()), adapter.head, adapter.model(IDS).logits
    quicken_(adapter)
    assert list(adapter.model.state_dict()) == names
    assert adapter.head.weight is head.weight
    assert {adapter.module(site.module).product.name for site in adapter.sites.of("linear")} == {CALIBRATION}
    torch.testing.assert_close(adapter.model(IDS).logits, before, rtol=0.05, atol=0.05)


def test_a_head_of_another_class_is_left_alone():
    class Head(torch.nn.Linear):
        pass

    adapter = small_adapter()
    head = Head(32, 40, bias=False)
    adapter.model.set_submodule("lm_head", head)
    quicken_(adapter)
    assert adapter.head is head
