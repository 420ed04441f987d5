"""Budgets through slots: every byte is counted as stored, overrides stay, and what slopes do not know is refused."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core import grids, tables
from paley.core.errors import PaleyError
from paley.core.plain_grids import to_plain
from paley.core.schemes import ActivationScheme, LinearScheme
from paley.core.transforms import Transform
from paley.format import spec
from paley.methods.nearest import gaussian_error
from paley.methods.sensitivity import MAX_T
from paley.model.adapter import Adapter
from paley.model.budget import (
    Slots,
    activation_schemes,
    check_budget,
    decide_grids,
    range_note,
    weight_candidates,
)
from paley.model.rotation import input_blocks
from paley.model.sensitivity import KINDS, noise_slots
from paley.recipe import apply_settings, preset
from paley.sensitivity import MeasuredSlot, MeasuredText, Sensitivity

TEXT = MeasuredText(source="random", sha256="0", tokens=1)


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Adapter(LlamaForCausalLM(config).eval())


def slopes(adapter, kinds=("weight",), folded=False, **alphas) -> Sensitivity:
    """alpha 1 for every slot, but for those whose name ends as a key of alphas says."""

    def slot(s):
        alpha = next((a for end, a in alphas.items() if s.name.endswith(end)), 1.0)
        return MeasuredSlot(kind=s.kind, numel=s.numel, alpha=alpha, stderr=0.0, levels=())

    found = {s.name: slot(s) for s in noise_slots(adapter, kinds)}
    return Sensitivity(
        fingerprint="x", model_type="llama", metric="kl", text=TEXT, seed=0, baseline=0.0, folded=folded, slots=found
    )


def recipe(*settings, name="higgs-4"):
    return apply_settings(preset(name), ["hadamard=null", *settings])


def slots_of(recipe, adapter) -> Slots:
    linears = {path: recipe.linear_scheme(path) for block in adapter.blocks for _, path in block.linears()}
    attentions = {p: recipe.attention_scheme(p) for p in (b.path("attention") for b in adapter.blocks)}
    return Slots(linears, attentions)


def stored_bits(slots, adapter) -> tuple[int, int]:
    """Bits that the linears' weights take, by the format's own account, and how many weights there are."""
    bits = weights = 0
    for path, slot in slots.linears.items():
        out_features, in_features = adapter.model.get_submodule(path).weight.shape
        tensors = spec.expected_tensors(path, slot, in_features, out_features).values()
        bits += sum(8 * (dtype.itemsize if dtype else 2) * prod(shape) for dtype, shape in tensors)
        weights += out_features * in_features
    return bits, weights


@pytest.mark.parametrize("limit", [2.6, 3.0, 3.3, 4.125, 6.0, 16.0])
def test_what_is_stored_meets_the_budget_and_more_bits_never_cost_accuracy(adapter, limit):
    wanted, sensitivity = recipe(f"budget={{weights: {limit}}}"), slopes(adapter, q_proj=0.01, down_proj=5.0)
    found, allocation = decide_grids(wanted, adapter, slots_of(wanted, adapter), sensitivity)
    bits, weights = stored_bits(found, adapter)
    assert limit - 0.2 < bits / weights <= limit
    assert allocation.costs == (bits,)
    widths = {path: adapter.model.get_submodule(path).in_features for path in found.linears}
    errors = {p: 0.0 if s.weight is None else gaussian_error(s.weight, widths[p]) for p, s in found.linears.items()}
    assert allocation.loss == pytest.approx(sum(sensitivity.slots[path].alpha * e for path, e in errors.items()))
    least, most = (max(e for path, e in errors.items() if path.endswith(end)) for end in ("down_proj", "q_proj"))
    assert least <= most
    _, more = decide_grids(recipe(f"budget={{weights: {limit + 0.5}}}") if limit < 16 else wanted, adapter,
                           slots_of(wanted, adapter), sensitivity)  # fmt: skip
    assert more.loss <= allocation.loss


def test_grids_beyond_the_linear_range_are_taken_only_where_they_must(adapter):
    for limit, beyond in ((3.2, False), (2.13, True)):
        wanted = recipe(f"budget={{weights: {limit}}}")
        found, _ = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter, k_proj=1e-6))
        assert any(s.weight.grid.mse > MAX_T**2 for s in found.linears.values() if s.weight) == beyond


def test_overrides_stay_and_are_paid_for(adapter):
    overrides = (
        "overrides=[{pattern: '*.0.mlp.*', weight: {grid: int8, method: nearest, scale_search: absmax}}, "
        "{pattern: '*.1.mlp.up_proj', keep: true}]"
    )
    wanted = recipe("budget={weights: 5.0}", overrides)
    start = slots_of(wanted, adapter)
    found, allocation = decide_grids(wanted, adapter, start, slopes(adapter))
    for path, slot in found.linears.items():
        if ".0.mlp." in path or path.endswith("1.mlp.up_proj"):
            assert slot == start.linears[path]
    # The layer that is kept is none of the quantized linears, whose average the budget limits.
    counted = Slots({p: s for p, s in found.linears.items() if not p.endswith("1.mlp.up_proj")}, {})
    bits, weights = stored_bits(counted, adapter)
    assert allocation.costs == (bits,)
    assert bits <= 5.0 * weights


def test_a_size_on_disk_counts_everything(adapter):
    everything = sum(p.numel() for p in adapter.model.parameters())
    wanted = recipe("budget={size: 150000}")
    found, _ = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter))
    bits, weights = stored_bits(found, adapter)
    total = bits // 8 + 2 * (everything - weights)
    assert 145_000 < total <= 150_000


def test_cache_and_inputs_have_budgets_of_their_own(adapter):
    wanted = recipe("budget={weights: 4.2, kv: 4.5, inputs: 5.0}", name="higgs-w4a4kv4")
    sensitivity = slopes(adapter, KINDS, keys=20.0, down_input=20.0)
    found, allocation = decide_grids(wanted, adapter, slots_of(wanted, adapter), sensitivity)
    keys = [s.keys.grid.bits for s in found.attentions.values()]
    values = [s.values.grid.bits for s in found.attentions.values()]
    assert sum(keys) > sum(values)
    heads, dim = 2, 32
    per_token = sum(heads * (dim * b + 24) for b in (*keys, *values))
    assert per_token == allocation.costs[1]
    assert per_token <= 4.5 * 4 * heads * dim
    down = [s.input for p, s in found.linears.items() if p.endswith("down_proj")]
    gate = [s.input for p, s in found.linears.items() if p.endswith("gate_proj")]
    assert min(s.grid.bits for s in down) > max(s.grid.bits for s in gate)
    block = found.linears["model.layers.0.self_attn.q_proj"], found.linears["model.layers.0.self_attn.v_proj"]
    assert block[0].input == block[1].input  # one tensor, rounded once


def test_stored_bytes_and_bytes_read_are_one_problem(adapter):
    settings = "budget={weights: 4.0, read: %d, context: 1000}"
    sensitivity = slopes(adapter, KINDS)
    start = recipe(settings % 10**9, name="higgs-w4a16kv4")
    loose, unlimited = decide_grids(start, adapter, slots_of(start, adapter), sensitivity)
    assert {s.keys.grid.name for s in loose.attentions.values()} == {"uint8"}  # nothing but `read` limits the cache
    head = 2 * adapter.part("head").weight.numel()
    limit = unlimited.costs[1] // 8 + head - 100_000
    wanted = recipe(settings % limit, name="higgs-w4a16kv4")
    _, limited = decide_grids(wanted, adapter, slots_of(wanted, adapter), sensitivity)
    assert limited.costs[0] <= unlimited.costs[0] * 1.001
    assert limited.costs[1] // 8 + head <= limit
    assert limited.loss > unlimited.loss


@pytest.mark.parametrize(
    ("settings", "change", "complaint"),
    [
        (["budget={weights: 0.5}"], {}, r"budget.weights: 0.5 bits are out of reach; 1.\d+ to 16 can be had here"),
        (["budget={weights: 17}"], {}, r"17 bits are out of reach; 1.\d+ to 16"),
        (["budget={weights: 4, kv: 3}"], {"kinds": KINDS}, "budget.kv: this recipe .* preset=higgs-w4a16kv4, or set"),
        (["budget={weights: 4, inputs: 3}"], {"kinds": KINDS}, "budget.inputs: this recipe .* preset=higgs-w4a4, or"),
        (["budget={weights: 4}"], {"name": "higgs-w16a4"}, "budget.weights: this recipe .* preset=higgs-4"),
        (["budget={size: 1000}"], {}, r"budget\.size: 1,000 bytes are out of reach; [\d,]+ to [\d,]+ can be had"),
        (["budget={weights: 4}"], {"folded": True}, "measured with the norms' gains in the weights"),
        (["budget={weights: 4, inputs: 5}"], {"name": "higgs-w4a4"}, r"has no slope.*measure_sensitivity\(kinds="),
    ],
)
def test_what_cannot_be_is_refused(adapter, settings, change, complaint):
    wanted = recipe(*settings, name=change.pop("name", "higgs-4"))
    sensitivity = slopes(adapter, **change)
    with pytest.raises(PaleyError, match=complaint):
        decide_grids(wanted, adapter, slots_of(wanted, adapter), sensitivity)


def test_a_kept_layer_needs_no_rotation(adapter):
    wanted = recipe("hadamard=32", "budget={weights: 16}")
    start = slots_of(wanted, adapter)
    rotated = {
        path: replace(slot, transform=input_blocks(adapter.model.get_submodule(path).in_features, 32, 0))
        for path, slot in start.linears.items()
    }
    found, _ = decide_grids(wanted, adapter, Slots(rotated, start.attentions), slopes(adapter))
    assert set(found.linears.values()) == {LinearScheme()}


INT8 = "{grid: int8, scale: absmax}"


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj"])
def test_inputs_that_share_a_tensor_may_be_rounded_apart(adapter, module):
    overrides = f"overrides=[{{pattern: '*{module}', input: {INT8}}}]"
    wanted = recipe("budget={inputs: 5}", "inputs={grid: int4, scale: absmax}", overrides)
    found, allocation = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter, ("input",)))
    for path, slot in found.linears.items():
        assert (slot.input == ActivationScheme("int8")) == path.endswith(module)
    apart = [name for name in allocation.choices if name.endswith("attn_input-1")]
    assert len(apart) == 2


def test_an_override_with_the_scheme_of_the_rest_still_stays(adapter):
    own = "{grid: int4, scale: absmax}"
    wanted = recipe("budget={inputs: 7}", f"inputs={own}", f"overrides=[{{pattern: '*k_proj', input: {own}}}]")
    found, _ = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter, ("input",)))
    got = {path.rsplit(".", 1)[1]: slot.input.grid.name for path, slot in found.linears.items()}
    assert got["k_proj"] == "int4"
    assert got["q_proj"] == got["v_proj"] != "int4"


def test_a_kept_weight_is_charged_as_it_is_stored(adapter):
    plain = "inputs=null", "budget={weights: 40, grids: [p2n256, keep]}", "dtype=float32"
    wanted = recipe(*plain)
    _, allocation = decide_grids(recipe(*plain[:1], "budget={weights: 16, grids: [p2n256, keep]}"), adapter,
                                 slots_of(wanted, adapter), slopes(adapter))  # fmt: skip
    weights = sum(m.weight.numel() for b in adapter.blocks for m in (b.part(role) for role, _ in b.linears()))
    assert allocation.costs == (16 * weights,)
    with pytest.raises(PaleyError, match="to 32 can be had here"):
        check_budget(wanted, adapter, slots_of(wanted, adapter))
    wanted = recipe("budget={weights: 32, grids: [p2n256, keep]}", "dtype=float32")
    _, allocation = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter))
    assert allocation.costs == (32 * weights,)


def test_a_kept_weight_is_as_wide_as_its_rotated_input(adapter):
    wanted = recipe("inputs={grid: int8, scale: absmax}", "budget={weights: 17, grids: [p2n256, keep]}")
    start = slots_of(wanted, adapter)
    wide = {
        path: replace(slot, transform=Transform(256, 328, 8, 0)) if path.endswith("down_proj") else slot
        for path, slot in start.linears.items()
    }
    found, allocation = decide_grids(wanted, adapter, Slots(wide, start.attentions), slopes(adapter))
    assert {slot.weight for slot in found.linears.values()} == {None}
    weights = sum(m.weight.numel() for b in adapter.blocks for m in (b.part(role) for role, _ in b.linears()))
    assert allocation.costs == (16 * (weights + 2 * 128 * 72),)


@pytest.mark.parametrize("budget", ["weights: 4", "size: 150000", "read: 150000", "kv: 4"])
def test_expansion_and_a_budget_exclude_each_other(adapter, budget):
    for setting, complaint in (("expand=64", "from 128 to 192"), ("expand_mlp=64", "from 256 to 320")):
        wanted = apply_settings(preset("w4a4kv4"), [f"budget={{{budget}}}", "search.method=none", "expand_mlp=0",
                                                    setting])  # fmt: skip
        with pytest.raises(PaleyError, match=rf"budget: {setting} widens .* {complaint}.*plan"):
            check_budget(wanted, adapter, slots_of(wanted, adapter))
    unchanged = apply_settings(preset("w4a4kv4"), ["budget={weights: 4.2}", "expand_mlp=auto"])
    check_budget(unchanged, adapter, slots_of(unchanged, adapter))


def least_read(wanted, adapter) -> int:
    """Bytes that the message of a budget out of reach gives as the fewest."""
    with pytest.raises(PaleyError, match=r"budget\.read: 1 bytes are out of reach") as error:
        check_budget(wanted, adapter, slots_of(wanted, adapter))
    return int(str(error.value).split("out of reach; ")[1].split(" to ")[0].replace(",", ""))


def test_bytes_read_count_what_is_kept(adapter):
    plain = recipe("budget={read: 1, context: 1000}", "overrides=[{pattern: '*.mlp.*', keep: true}]")
    mlp, cache = 2 * 2 * 3 * 128 * 256, 1000 * 2 * 2 * 2 * 64  # 16 bits; two layers, keys and values
    smallest = LinearScheme(replace(plain.weights, grid="p2n4"))  # two bits for two values, and a scale a row
    attention = 2 * sum(spec.linear_bytes("x", smallest, 128, out, 2) for out in (128, 64, 64, 128))
    head = 2 * 50 * 128
    assert least_read(plain, adapter) == attention + mlp + cache + head
    values_only = plain.model_copy(update={"values": ActivationScheme("uint4")})
    uint2 = 1000 * 2 * (2 * (32 // 4 + 3))
    assert least_read(values_only, adapter) == attention + mlp + cache // 2 + uint2 + head


def test_a_size_counts_the_mean_keys(adapter):
    settings = ["budget={size: 1}", "search.method=none", "rotate=false", "expand_mlp=0"]
    least = []
    for centered in ("true", "false"):
        wanted = apply_settings(preset("w4a4kv4"), [*settings, f"center_keys={centered}"])
        with pytest.raises(PaleyError, match="out of reach") as error:
            check_budget(wanted, adapter, slots_of(wanted, adapter))
        least.append(int(str(error.value).split("out of reach; ")[1].split(" to ")[0].replace(",", "")))
    assert least[0] - least[1] == 2 * 2 * 32 * 2  # layers, heads, dimensions, bytes


def test_candidates_are_the_kin_of_the_recipes_grid():
    for grid in ("e8q14k4", "nf4", "af3", "int4"):
        scale = "rms" if grids.load(grid).p > 1 else "absmax"
        wanted = recipe("budget={weights: 4}", f"weights={{grid: {grid}, method: nearest, scale_search: {scale}}}")
        family = grids.family(grids.load(grid))
        assert weight_candidates(wanted) == {g.name: g for g in family} | {"keep": None}


def test_gaussian_grids_of_all_dimensions_are_candidates_without_data():
    assert list(weight_candidates(recipe("budget={weights: 4}"))) == [*tables.names(), "keep"]
    own = grids.custom(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))
    wanted = recipe("budget={weights: 4}", f"weights.grid={json.dumps(to_plain(own))}")
    assert list(weight_candidates(wanted).items())[:2] == [(own.name, own), ("p1n2", grids.load("p1n2"))]
    calibrated = recipe("budget={weights: 4}", "weights.method=gptq", "weights.scale_search=rms")
    pairs = [grid.name for grid in grids.family(grids.load("p2n256"))]
    assert list(weight_candidates(calibrated)) == [*pairs, "keep"]


def test_eight_bits_have_a_grid(adapter):
    wanted = recipe("budget={weights: 8.2}")
    found, allocation = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter))
    assert "p1n256" in {slot.weight.grid.name for slot in found.linears.values() if slot.weight}
    kin = recipe(
        f"budget={{weights: 8.2, grids: [{', '.join(g.name for g in grids.family(grids.load('p2n256')))}, keep]}}"
    )
    assert allocation.loss < decide_grids(kin, adapter, slots_of(kin, adapter), slopes(adapter))[1].loss / 2


def test_keys_and_values_get_the_scheme_of_least_measured_error(adapter):
    wanted = recipe("budget={kv: 8.6}", name="higgs-w4a16kv4")
    start, asked = slots_of(wanted, adapter), set()

    def errors(place, scheme, width):
        asked.add((place, scheme))
        clipped = scheme.clip_ratio < 1
        few = scheme.grid.bits < 5
        return 4.0**-scheme.grid.bits * (1 if clipped == few else 2)

    found, allocation = decide_grids(wanted, adapter, start, slopes(adapter, KINDS), errors)
    schemes = [s for slot in found.attentions.values() for s in (slot.keys, slot.values)]
    assert all((s.clip_ratio < 1) == (s.grid.bits < 5) for s in schemes)
    assert allocation.loss == pytest.approx(sum(4.0**-s.grid.bits for s in schemes))
    places = {(f"model.layers.{i}.self_attn", what) for i in (0, 1) for what in ("keys", "values")}
    offered = activation_schemes(wanted, adapter, start)
    assert offered.keys() == places
    assert asked == {(place, scheme) for place in places for scheme in offered[place]}
    assert len(asked) == 4 * 7 * 2  # places, bits, clip ratios
    assert activation_schemes(recipe("budget={weights: 4}", name="higgs-w4a16kv4"), adapter, start) == {}


@pytest.mark.parametrize(
    ("limit", "setting", "note"),
    [
        (2.6, "", "budget: below 3 bits losses grow faster than predicted"),
        (9, ", grids: [p1n3, keep]", "budget: some weights are rounded beyond the range of the slopes"),
        (3.4, "", ""),
    ],
)
def test_budgets_beyond_the_linear_range_are_mentioned(adapter, limit, setting, note):
    wanted = recipe(f"budget={{weights: {limit}{setting}}}")
    found, _ = decide_grids(wanted, adapter, slots_of(wanted, adapter), slopes(adapter))
    text = range_note(wanted, adapter, found)
    assert text.startswith(note)
    assert bool(text) == bool(note)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "input"}, r"0\.self_attn\.q_proj was measured as input of 16,384 values, .* weight of 16,384"),
        (
            {"numel": 7},
            r"0\.self_attn\.q_proj was measured as weight of 7 values, in this model it is weight of 16,384",
        ),
    ],
)
def test_slopes_of_another_make_are_refused(adapter, change, complaint):
    wanted, good, name = recipe("budget={weights: 4}"), slopes(adapter), "model.layers.0.self_attn.q_proj"
    changed = good.slots | {name: good.slots[name].model_copy(update=change)}
    with pytest.raises(PaleyError, match=complaint):
        check_budget(wanted, adapter, slots_of(wanted, adapter), good.model_copy(update={"slots": changed}))
