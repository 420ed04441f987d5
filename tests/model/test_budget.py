"""Budgets over sites: every byte is counted as stored, overrides stay, and what slopes do not know is refused."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core import grids, tables, trellis
from paley.core.errors import PaleyError
from paley.core.plain_grids import to_plain
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.format import spec
from paley.methods.nearest import gaussian_error
from paley.methods.sensitivity import MAX_T
from paley.model.budget import activation_options, check_budget, decide_grids, range_note
from paley.model.choices import KEEP, gaussian_errors, items, weight_candidates
from paley.model.loading import Source, open_source
from paley.model.problem import Problem
from paley.model.sensitivity import KINDS, noise_kind, noise_sites
from paley.pipeline.resolve import resolve
from paley.recipe import apply_settings, preset
from paley.sensitivity import MeasuredSlot, MeasuredText, Sensitivity

TEXT = MeasuredText(source="random", sha256="0", tokens=1)
KEPT = ("embedding=null", "head=null")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def opened(folder, **changes) -> Source:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A model most of whose weights are its words."""
    return opened(tmp_path_factory.mktemp("wordy"), vocab_size=2000)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("tied"), vocab_size=2000, tie_word_embeddings=True)


def slopes(source, kinds=("weight",), folded=False, **alphas) -> Sensitivity:
    """alpha 1 for every site, but for those whose name ends as a key of alphas says."""

    def slope(site):
        alpha = next((a for end, a in alphas.items() if site.name.endswith(end)), 1.0)
        return MeasuredSlot(kind=noise_kind(site), numel=site.numel, alpha=alpha, stderr=0.0, levels=())

    found = {name: slope(site) for name, site in noise_sites(source.sites, kinds).items()}
    return Sensitivity(
        fingerprint="x", model_type="llama", metric="kl", text=TEXT, seed=0, baseline=0.0, folded=folded, slots=found
    )


def recipe(*settings, name="higgs-4"):
    """Unrotated, and with the embedding and the head kept."""
    return apply_settings(preset(name), ["rotate=none", *KEPT, *settings])


def problem(source, *settings, **name) -> Problem:
    return resolve(source, recipe(*settings, **name))


def linears_of(source, schemes):
    """Name -> scheme of the linears of the blocks."""
    return {site.name: schemes.linears[site.name] for site in source.sites.of("linear")}


def stored_bits(source, linears) -> tuple[int, int]:
    """Bits that these weights take, by the format's own account, and how many weights there are."""
    bits = weights = 0
    for path, scheme in linears.items():
        out_features, in_features = source.sites[path].shape
        tensors = spec.expected_tensors(path, scheme, scheme.stored_width(in_features), out_features).values()
        bits += sum(8 * (dtype.itemsize if dtype else 2) * prod(shape) for dtype, shape in tensors)
        weights += out_features * in_features
    return bits, weights


def least_bytes(source, *settings, **name) -> int:
    """Bytes that the message of a budget out of reach gives as the fewest."""
    with pytest.raises(PaleyError, match="1 bytes are out of reach") as error:
        problem(source, *settings, **name)
    return int(str(error.value).split("out of reach; ")[1].split(" to ")[0].replace(",", ""))


@pytest.mark.parametrize("limit", [2.6, 3.0, 3.3, 4.125, 6.0, 16.0])
def test_what_is_stored_meets_the_budget_and_more_bits_never_cost_accuracy(source, limit):
    sensitivity = slopes(source, q_proj=0.01, down_proj=5.0)
    found, allocation = decide_grids(problem(source, f"budget={{weights: {limit}}}"), sensitivity)
    linears = linears_of(source, found)
    bits, weights = stored_bits(source, linears)
    assert limit - 0.2 < bits / weights <= limit
    assert allocation.costs == (bits,)
    widths = {path: source.sites[path].shape[1] for path in linears}
    errors = {p: 0.0 if s.weight is None else gaussian_error(s.weight, widths[p]) for p, s in linears.items()}
    assert allocation.loss == pytest.approx(sum(sensitivity.slots[path].alpha * e for path, e in errors.items()))
    least, most = (max(e for path, e in errors.items() if path.endswith(end)) for end in ("down_proj", "q_proj"))
    assert least <= most
    _, more = decide_grids(problem(source, f"budget={{weights: {min(limit + 0.5, 16)}}}"), sensitivity)
    assert more.loss <= allocation.loss


def test_grids_beyond_the_linear_range_are_taken_only_where_they_must(source):
    for limit, beyond in ((3.2, False), (2.13, True)):
        found, _ = decide_grids(problem(source, f"budget={{weights: {limit}}}"), slopes(source, k_proj=1e-6))
        assert any(s.weight.grid.mse > MAX_T**2 for s in found.linears.values() if s.weight) == beyond


def test_overrides_stay_and_are_paid_for(source):
    overrides = (
        "overrides=[{pattern: '*.0.mlp.*', weight: {grid: int8, method: nearest, scale_search: absmax}}, "
        "{pattern: '*.1.mlp.up_proj', keep: true}]"
    )
    start = problem(source, "budget={weights: 5.0}", overrides)
    found, allocation = decide_grids(start, slopes(source))
    for path, scheme in found.linears.items():
        if ".0.mlp." in path or path.endswith("1.mlp.up_proj"):
            assert scheme == start.schemes.linears[path]
    # The layer that is kept is none of the quantized linears, whose average the budget limits.
    counted = {p: s for p, s in linears_of(source, found).items() if not p.endswith("1.mlp.up_proj")}
    bits, weights = stored_bits(source, counted)
    assert allocation.costs == (bits,)
    assert bits <= 5.0 * weights


def everything(source) -> int:
    return sum(p.numel() for p in source.skeleton.parameters())


def test_a_size_on_disk_counts_everything(source):
    found, _ = decide_grids(problem(source, "budget={size: 150000}"), slopes(source))
    bits, weights = stored_bits(source, linears_of(source, found))
    total = bits // 8 + 2 * (everything(source) - weights)
    assert 145_000 < total <= 150_000


def test_cache_and_inputs_have_budgets_of_their_own(source):
    start = problem(source, "budget={weights: 4.2, kv: 4.5, inputs: 5.0}", name="higgs-w4a4kv4")
    sensitivity = slopes(source, KINDS, keys=20.0, down_input=20.0)
    found, allocation = decide_grids(start, sensitivity)
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


def test_stored_bytes_and_bytes_read_are_one_problem(source):
    settings = "budget={weights: 4.0, read: %d, context: 1000}"
    sensitivity = slopes(source, KINDS)
    loose, unlimited = decide_grids(problem(source, settings % 10**9, name="higgs-w4a16kv4"), sensitivity)
    assert {s.keys.grid.name for s in loose.attentions.values()} == {"uint8"}  # nothing but `read` limits the cache
    head = 2 * source.sites.head.numel
    limit = unlimited.costs[1] // 8 + head - 100_000
    _, limited = decide_grids(problem(source, settings % limit, name="higgs-w4a16kv4"), sensitivity)
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
def test_what_cannot_be_is_refused(source, settings, change, complaint):
    name = change.pop("name", "higgs-4")
    sensitivity = slopes(source, **change)
    with pytest.raises(PaleyError, match=complaint):
        decide_grids(problem(source, *settings, name=name), sensitivity)


def test_a_kept_layer_needs_no_rotation(source):
    start = problem(source, "rotate=online", "hadamard=32", "budget={weights: 16}")
    assert {scheme.transform.order for scheme in linears_of(source, start.schemes).values()} == {32}
    found, _ = decide_grids(start, slopes(source))
    assert set(found.linears.values()) == {LinearScheme()}


INT8 = "{grid: int8, scale: absmax}"


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj"])
def test_inputs_that_share_a_tensor_may_be_rounded_apart(source, module):
    overrides = f"overrides=[{{pattern: '*{module}', input: {INT8}}}]"
    start = problem(source, "budget={inputs: 5}", "inputs={grid: int4, scale: absmax}", overrides)
    found, allocation = decide_grids(start, slopes(source, ("input",)))
    for path, scheme in found.linears.items():
        assert (scheme.input == ActivationScheme("int8")) == path.endswith(module)
    apart = [name for name in allocation.choices if name.endswith("attn_input-1")]
    assert len(apart) == 2


def test_an_override_with_the_scheme_of_the_rest_still_stays(source):
    own = "{grid: int4, scale: absmax}"
    settings = "budget={inputs: 7}", f"inputs={own}", f"overrides=[{{pattern: '*k_proj', input: {own}}}]"
    found, _ = decide_grids(problem(source, *settings), slopes(source, ("input",)))
    got = {path.rsplit(".", 1)[1]: scheme.input.grid.name for path, scheme in linears_of(source, found).items()}
    assert got["k_proj"] == "int4"
    assert got["q_proj"] == got["v_proj"] != "int4"


def test_a_kept_weight_is_charged_as_it_is_stored(source):
    weights = sum(site.numel for site in source.sites.of("linear"))
    grids = "grids: [p2n256, keep]"
    _, allocation = decide_grids(problem(source, f"budget={{weights: 16, {grids}}}"), slopes(source))
    assert allocation.costs == (16 * weights,)
    with pytest.raises(PaleyError, match="to 32 can be had here"):
        problem(source, f"budget={{weights: 40, {grids}}}", "dtype=float32")
    wide = problem(source, f"budget={{weights: 32, {grids}}}", "dtype=float32")
    assert decide_grids(wide, slopes(source))[1].costs == (32 * weights,)


def test_a_kept_weight_is_as_wide_as_its_rotated_input(source):
    start = problem(source, "inputs={grid: int8, scale: absmax}", "budget={weights: 16, grids: [p2n256, keep]}")
    wide = {
        path: replace(scheme, transform=Transform(256, 328, 8, 0)) if path.endswith("down_proj") else scheme
        for path, scheme in start.schemes.linears.items()
    }
    widened = start.with_schemes(
        replace(start.schemes, linears=wide), budget=start.budget.model_copy(update={"weights": 17.0})
    )
    found, allocation = decide_grids(widened, slopes(source))
    assert {scheme.weight for scheme in found.linears.values()} == {None}
    weights = sum(site.numel for site in source.sites.of("linear"))
    assert allocation.costs == (16 * (weights + 2 * 128 * 72),)


@pytest.mark.parametrize("budget", ["weights: 4", "size: 150000", "read: 150000", "kv: 4"])
def test_expansion_and_a_budget_exclude_each_other(source, budget):
    for setting, complaint in (("expand=64", "from 128 to 192"), ("expand_mlp=64", "from 256 to 320")):
        wanted = apply_settings(preset("w4a4kv4"), [f"budget={{{budget}}}", "search.method=none", "expand_mlp=0",
                                                    setting])  # fmt: skip
        with pytest.raises(PaleyError, match=rf"budget: {setting} widens .* {complaint}.*plan"):
            resolve(source, wanted)
    unchanged = apply_settings(preset("w4a4kv4"), ["budget={weights: 4.2}", "expand_mlp=auto"])
    check_budget(resolve(source, unchanged))


def test_bytes_read_count_what_is_kept(source):
    settings = "budget={read: 1, context: 1000}", "overrides=[{pattern: '*.mlp.*', keep: true}]"
    mlp, cache = 2 * 2 * 3 * 128 * 256, 1000 * 2 * 2 * 2 * 64  # 16 bits; two layers, keys and values
    smallest = LinearScheme(replace(recipe().weights, grid="p2n4"))  # two bits for two values, and a scale a row
    attention = 2 * sum(spec.linear_bytes("x", smallest, 128, out, 2) for out in (128, 64, 64, 128))
    head = 2 * 50 * 128
    assert least_bytes(source, *settings) == attention + mlp + cache + head
    uint2 = 1000 * 2 * (2 * (32 // 4 + 3))
    assert least_bytes(source, *settings, "values={grid: uint4}") == attention + mlp + cache // 2 + uint2 + head


def test_a_size_counts_the_mean_keys(source):
    settings = "budget={size: 1}", "search.method=none", "expand_mlp=0"
    with_means, without = (
        least_bytes(source, *settings, f"center_keys={c}", name="w4a4kv4") for c in ("true", "false")
    )
    assert with_means - without == 2 * 2 * 32 * 2  # layers, heads, dimensions, bytes


def test_candidates_are_the_kin_of_the_recipes_grid(source):
    start = problem(source, "budget={weights: 4}")
    for grid in ("e8q14k4", "nf4", "af3", "int4"):
        scale = "rms" if grids.load(grid).p > 1 else "absmax"
        family = grids.family(grids.load(grid))
        assert weight_candidates(start, WeightScheme(grid, None, "nearest", scale)) == [*family, None]


def test_gaussian_grids_of_all_dimensions_are_candidates_without_data(source):
    start = problem(source, "budget={weights: 4}")
    scheme = start.schemes.linears["model.layers.0.mlp.up_proj"].weight
    assert weight_candidates(start, scheme) == [*map(grids.load, tables.names()), None]
    own = grids.custom(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))
    custom = recipe(f"weights.grid={json.dumps(to_plain(own))}").weights
    assert weight_candidates(start, custom)[:2] == [own, grids.load("p1n2")]
    calibrated = replace(scheme, method="gptq", scale_search="rms")
    assert weight_candidates(start, calibrated) == [*grids.family(grids.load("p2n256")), None]


def test_tables_are_candidates_beside_trellis_codes(source):
    start = problem(source, "budget={weights: 4}", "weights.grid=trellis4")
    scheme = start.schemes.linears["model.layers.0.mlp.up_proj"].weight
    codes = [grids.load(name) for name in trellis.names()]
    assert weight_candidates(start, scheme) == [*codes, *map(grids.load, tables.names()), None]
    calibrated = replace(scheme, method="gptq", scale_search="rms")
    few = [grid for grid in map(grids.load, tables.names()) if grid.p <= 2]
    assert weight_candidates(start, calibrated) == [*codes, *few, None]
    embedding = WeightScheme("p1n64", None, "nearest", "rms")
    assert [*weight_candidates(start, embedding)][: len(codes)] == codes


def test_no_column_of_a_trellis_is_an_outlier(source):
    """An integer head with outliers, beside linears on a trellis, stays on integers."""
    start = problem(source, "budget={weights: 4}", "weights.grid=trellis4")
    head = LinearScheme(WeightScheme("int8", None, "nearest", "absmax"), outliers=2)
    schemes = replace(start.schemes, linears=start.schemes.linears | {"lm_head": head})
    (item,) = (i for i in items(start.with_schemes(schemes), gaussian_errors, {"weight"}) if i.name == "lm_head")
    assert item.schemes.keys() == {KEEP, *(grid.name for grid in grids.family(grids.load("int8")))}


def test_eight_bits_have_a_grid(source):
    found, allocation = decide_grids(problem(source, "budget={weights: 8.2}"), slopes(source))
    assert "p1n256" in {scheme.weight.grid.name for scheme in found.linears.values() if scheme.weight}
    names = ", ".join(grid.name for grid in grids.family(grids.load("p2n256")))
    kin = problem(source, f"budget={{weights: 8.2, grids: [{names}, keep]}}")
    assert allocation.loss < decide_grids(kin, slopes(source))[1].loss / 2


def test_keys_and_values_get_the_scheme_of_least_measured_error(source):
    start, asked = problem(source, "budget={kv: 8.6}", name="higgs-w4a16kv4"), set()

    def errors(place, scheme, width):
        asked.add((place, scheme))
        clipped = scheme.clip_ratio < 1
        few = scheme.grid.bits < 5
        return 4.0**-scheme.grid.bits * (1 if clipped == few else 2)

    found, allocation = decide_grids(start, slopes(source, KINDS), errors)
    schemes = [s for attention in found.attentions.values() for s in (attention.keys, attention.values)]
    assert all((s.clip_ratio < 1) == (s.grid.bits < 5) for s in schemes)
    assert allocation.loss == pytest.approx(sum(4.0**-s.grid.bits for s in schemes))
    places = {(f"model.layers.{i}.self_attn", what) for i in (0, 1) for what in ("keys", "values")}
    offered = activation_options(start)
    assert offered.keys() == places
    assert asked == {(place, scheme) for place in places for scheme in offered[place]}
    assert len(asked) == 4 * 7 * 2  # places, bits, clip ratios
    assert activation_options(problem(source, "budget={weights: 4}", name="higgs-w4a16kv4")) == {}


@pytest.mark.parametrize(
    ("limit", "setting", "note"),
    [
        (2.6, "", "budget: below 3 bits losses grow faster than predicted"),
        (9, ", grids: [p1n3, keep]", "budget: some weights are rounded beyond the range of the slopes"),
        (3.4, "", ""),
    ],
)
def test_budgets_beyond_the_linear_range_are_mentioned(source, limit, setting, note):
    start = problem(source, f"budget={{weights: {limit}{setting}}}")
    found, _ = decide_grids(start, slopes(source))
    text = range_note(start.with_schemes(found))
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
def test_slopes_of_another_make_are_refused(source, change, complaint):
    start, good, name = problem(source, "budget={weights: 4}"), slopes(source), "model.layers.0.self_attn.q_proj"
    changed = good.slots | {name: good.slots[name].model_copy(update=change)}
    with pytest.raises(PaleyError, match=complaint):
        check_budget(start, good.model_copy(update={"slots": changed}))


def coded(source, **budget) -> Problem:
    """Embedding and head are decided, too."""
    limits = ", ".join(f"{key}: {value}" for key, value in budget.items())
    return resolve(source, apply_settings(preset("higgs-4"), ["rotate=none", f"budget={{{limits}}}"]))


@pytest.mark.parametrize("loud", [EMBEDDING, HEAD])
def test_embedding_and_head_are_decided_as_other_weights_are(wordy, loud):
    found, allocation = decide_grids(coded(wordy, weights=3.0), slopes(wordy, **{loud: 50.0}))
    bits, weights = stored_bits(wordy, found.linears)
    assert weights == sum(site.numel for site in wordy.sites.weights)
    assert allocation.costs == (bits,)
    assert 2.8 < bits / weights <= 3.0
    quiet = EMBEDDING if loud == HEAD else HEAD
    errors = {name: allocation.choices[name].loss for name in (loud, quiet)}
    assert errors[loud] / 50 < errors[quiet]
    assert found.linears[loud].weight.grid.bits > found.linears[quiet].weight.grid.bits


def test_a_size_on_disk_pays_for_embedding_and_head(wordy):
    limit = 400_000  # less than the words alone take in 16 bits
    assert limit < 2 * 2 * 2000 * 128
    found, _ = decide_grids(coded(wordy, size=limit), slopes(wordy))
    bits, weights = stored_bits(wordy, found.linears)
    assert 0.97 * limit < bits // 8 + 2 * (everything(wordy) - weights) <= limit
    with pytest.raises(PaleyError, match="400,000 bytes are out of reach"):
        problem(wordy, f"budget={{size: {limit}}}")


def test_a_tied_pair_is_decided_and_paid_for_once(tied):
    found, allocation = decide_grids(coded(tied, size=250_000), slopes(tied))
    assert HEAD not in allocation.choices
    assert HEAD not in found.linears
    bits, weights = stored_bits(tied, found.linears)
    assert weights == sum(site.numel for site in tied.sites.weights)
    assert 240_000 < bits // 8 + 2 * (everything(tied) - weights) <= 250_000
    assert found.linears[EMBEDDING].weight is not None


def test_bytes_read_count_the_head_and_a_tied_pair_but_no_embedding_alone(wordy, tied):
    smallest = LinearScheme(replace(recipe().weights, grid="p2n4"))
    bits, _ = stored_bits(wordy, dict.fromkeys((site.name for site in wordy.sites.of("linear")), smallest))
    words, cache = spec.linear_bytes("x", smallest, 128, 2000, 2), 1000 * 2 * 2 * 2 * 64
    for source in (wordy, tied):
        with pytest.raises(PaleyError, match="1 bytes are out of reach") as error:
            coded(source, read=1, context=1000)
        assert f"reach; {bits // 8 + words + cache:,} to " in str(error.value)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_slopes_without_embedding_or_head_are_refused(wordy, name):
    start, good = coded(wordy, weights=3.0), slopes(wordy)
    old = good.model_copy(update={"slots": {n: slope for n, slope in good.slots.items() if n != name}})
    with pytest.raises(PaleyError, match=f"{name} has no slope.*measure_sensitivity"):
        decide_grids(start, old)
    # A budget that does not decide it does not need it.
    decide_grids(problem(wordy, "budget={weights: 3.0}"), old)


def test_few_bits_are_mentioned_whatever_the_words_take(wordy):
    start = problem(wordy, "budget={weights: 2.6}")
    found, _ = decide_grids(start, slopes(wordy))
    assert "below 3 bits" in range_note(start.with_schemes(found))
