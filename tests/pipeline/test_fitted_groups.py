"""A preset's groups on widths that they do not divide are fitted, planned and printed; those of a hand are refused."""

import random
from dataclasses import replace

import pytest

import paley
from command_line import paley_
from paley.core.errors import PaleyError
from paley.core.schemes import WeightScheme
from paley.model.loading import open_source
from paley.pipeline import Monitor, make_plan, quantize
from paley.pipeline.curve import accuracy_size_curve
from paley.pipeline.resolve import resolve
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

FITTED = "groups of 88 in 10 layers, 80 in 2 and 92 in 2, whose width 128 does not divide"
GROUPS = {"q_proj": 88, "k_proj": 88, "v_proj": 88, "o_proj": 80, "gate_proj": 88, "up_proj": 88, "down_proj": 92}
BUDGET = "budget={weights: 3.5, source: self, sequences: 2, seq_len: 16, levels: 3}"


class Listening(Monitor):
    def __init__(self):
        self.heard = []

    def note(self, text):
        self.heard.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """Widths 176, 92, and 80 of o_proj, which no expansion reaches."""
    sizes = {"hidden_size": 176, "intermediate_size": 92, "head_dim": 20}
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_tokenizer, **sizes)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    rng, file = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dogs", "sing", "when", "rain", "falls"]
    file.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=60)) for _ in range(60)))
    parts = ("calibration", "search", "test")
    return [f"calibration.source={file}", *(f"{p}.{key}" for p in parts for key in ("sequences=4", "seq_len=32"))]


def groups(linears, part):
    """Last name of a linear -> the group sizes that the linears of that name have."""
    found = {}
    for path, scheme in linears.items():
        rounding = getattr(scheme, part)
        if ".layers." in path:
            found.setdefault(path.rpartition(".")[2], set()).add(rounding.group_size if rounding else None)
    return found


def decided(model, recipe):
    """-> the weights' schemes, their stored widths, and what is printed."""
    problem = resolve(open_source(model), recipe)
    widths = {site.name: scheme.stored_width(problem.shape(site)[1]) for site, scheme in problem.weights()}
    said = [note.removeprefix("fit_groups: ") for note in problem.notes if note.startswith("fit_groups: ")]
    return problem.schemes.linears, widths, "".join(said)


def test_the_preset_works_and_says_what_it_took(model, sizes, tmp_path):
    args = [model, "--preset", "w1a4", "--set", *sizes, "--output"]
    planned = paley_("plan", *args, tmp_path / "plan.json")
    assert f"fit_groups: {FITTED}\n" in planned.err
    for grid in ("free2 gptq", "uint4"):
        assert all(f"{grid} /{size} × {count}" in planned.out for size, count in ((88, 10), (80, 2), (92, 2)))
    plan = paley.Plan.load(tmp_path / "plan.json")
    for part in ("weight", "input"):
        assert groups(plan.linears, part) == {name: {size} for name, size in GROUPS.items()}
    made = paley_("quantize", *args, tmp_path / "out")
    assert f"fit_groups: {FITTED}\n" in made.err
    shown = paley_("inspect", tmp_path / "out").out
    assert all(f"/{size}" in shown for size in GROUPS.values())
    assert "/128" not in shown
    executed = paley_("quantize", model, "--plan", tmp_path / "plan.json", "--output", tmp_path / "again")
    assert "fit_groups" not in executed.err  # nothing was decided
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_plan_is_executed_as_it_stands(model, sizes, tmp_path):
    plan = make_plan(model, apply_settings(preset("w1a16"), sizes))
    name = "model.layers.1.mlp.down_proj"
    scheme = plan.linears[name]
    edited = plan.linears | {name: replace(scheme, weight=replace(scheme.weight, group_size=46))}
    quantize(model, plan=plan.model_copy(update={"linears": edited}), output=tmp_path / "out")
    assert paley.load(tmp_path / "out").get_submodule(name).scheme.weight.group_size == 46
    edited |= {name: replace(scheme, weight=replace(scheme.weight, group_size=128))}
    refused = rf"{name}: in_features=92 is no multiple of group_size=128; set a divisor such as 92$"
    with pytest.raises(PaleyError, match=refused):
        quantize(model, plan=plan.model_copy(update={"linears": edited}), output=tmp_path / "no")


REFUSED = {
    "w1g64a4": (
        (),
        r"q_proj: in_features=176 is no multiple of group_size=64; set a divisor such as 44 or 88 \(weights",
    ),
    "w1g88a4": ((), r"o_proj: in_features=80 .* such as 80 \(weights.group_size, inputs.group_size"),
    "w1a16": (
        ("overrides=[{pattern: '*o_proj', weight: {grid: int4, group_size: 32}}]",),
        r"o_proj: in_features=80 .* such as 20 or 40 in the override that gave it, which fit_groups leaves as it is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_group_written_by_hand_is_refused_where_it_does_not_divide(name, model, sizes):
    settings, refused = REFUSED[name]
    with pytest.raises(PaleyError, match=refused):
        make_plan(model, apply_settings(preset(name), [*sizes, *settings]))
    without = [setting for setting in settings if not setting.startswith("overrides")]
    make_plan(model, apply_settings(preset(name), [*sizes, *without, "fit_groups=true"]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), GROUPS),
        (("expand=16",), GROUPS | dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 96)),
        (("expand_mlp=4",), GROUPS | {"down_proj": 96}),
        (("rotate=online", "hadamard=1024"), GROUPS),
        (("rotate=online", "hadamard=64"), GROUPS | {"down_proj": 128}),  # padded, as only tiny blocks divide 92
        (("rotate=folded", "weights.group_size=null", "inputs.group_size=null"), dict.fromkeys(GROUPS)),
        (
            ("overrides=[{pattern: '*.o*', weight: {grid: int4, group_size: 8}, input: {grid: int4, group_size: 8}}]",),
            GROUPS | {"o_proj": 8},
        ),
    ],
)
def test_groups_fit_what_is_stored(settings, expected, model):
    linears, widths, _ = decided(model, apply_settings(preset("w1a4"), settings))
    for part in ("weight", "input"):
        assert groups(linears, part) == {name: {size} for name, size in expected.items()}
        assert all(
            not size or widths[p] % size == 0
            for p, s in linears.items()
            for size in [getattr(getattr(s, part), "group_size", None)]
        )


def test_blocks_that_pad_a_width_are_what_groups_are_fitted_to(tmp_path, tiny_tokenizer):
    narrow = save_tiny(tmp_path, tiny_tokenizer)  # 37, and 48 in blocks of 16
    made = apply_settings(preset("higgs-w3a4"), ["hadamard=16", "weights.group_size=64", "fit_groups=true"])
    linears, widths, said = decided(narrow, made)
    assert widths["model.layers.0.mlp.down_proj"] == 48
    assert said == "groups of 48 in 14 layers, whose width 64 does not divide"
    free = apply_settings(made, ["weights.group_size=null"])
    linears, _, said = decided(narrow, free)
    assert {scheme.weight.group_size for scheme in linears.values()} == {16}
    assert said == ""


def test_what_is_printed_counts_only_what_was_fitted(model):
    apart = apply_settings(preset("w1g88a4"), ["inputs.group_size=46", "fit_groups=true"])
    assert decided(model, apart)[2] == (
        "groups of 44 in 10 layers and 40 in 2, whose width 46 does not divide; "
        "groups of 80 in 2 layers and 92 in 2, whose width 88 does not divide"
    )
    kept = ["overrides=[{pattern: '*.self_attn.*', keep: true}, {pattern: '*.0.mlp.*', keep: true}]"]
    assert decided(model, apply_settings(preset("w1a16"), kept))[2] == (
        "groups of 88 in 2 layers and 92 in 1, whose width 128 does not divide"
    )
    one = ["overrides=[{pattern: '*.[01].[sm]*.[kvoqgu]*', keep: true}, {pattern: '*.0.*', keep: true}]"]
    assert decided(model, apply_settings(preset("w1a16"), one))[2] == (
        "groups of 92 in 1 layer, whose width 128 does not divide"
    )
    assert decided(model, preset("w4a4"))[2] == decided(model, preset("w1g4a16"))[2] == ""


def test_budgets_keep_the_groups(model, sizes):
    monitor, recipe = Listening(), apply_settings(preset("w1a4"), [*sizes, BUDGET])
    plan = make_plan(model, recipe, monitor=monitor)
    assert f"fit_groups: {FITTED}" in monitor.heard
    grids = {scheme.weight.grid.name for scheme in plan.linears.values() if scheme.weight is not None}
    assert len(grids) > 1
    for path, scheme in plan.linears.items():
        if ".layers." not in path:
            continue
        size = GROUPS[path.rpartition(".")[2]]
        assert scheme.input.group_size == size
        assert scheme.weight is None or scheme.weight.group_size == size
    monitor = Listening()
    accuracy_size_curve(model, recipe, [3.5, 4.5], monitor=monitor)
    assert monitor.heard.count(f"fit_groups: {FITTED}") == 1


def test_any_recipe_can_ask_for_it(model):
    wanted = apply_settings(preset("rtn-w4g128a8"), ["fit_groups=true"])
    linears, _, said = decided(model, wanted)
    assert linears["model.layers.0.mlp.up_proj"].weight == WeightScheme("int4", 88, "nearest", "absmax")
    assert linears["model.layers.0.mlp.up_proj"].input.group_size is None
    assert said == FITTED
