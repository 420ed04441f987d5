"""Recipes survive their file formats, presets say what they are known for, and each mistake is named."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from pydantic import ValidationError

from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.recipe import (
    Budget,
    Calibration,
    Override,
    Recipe,
    Search,
    Test,
    apply_settings,
    load_recipe,
    preset,
    preset_methods,
    under_budget,
)


def full_recipe() -> Recipe:
    """A recipe with nothing left at its default."""
    return Recipe(
        weights=WeightScheme("int3", 64, "nearest", "absmax", sweeps=2),
        inputs=ActivationScheme("gauss3", "rms", 1.1, 32),
        keys=ActivationScheme("uint4", clip_ratio=0.1 + 0.2),
        values=ActivationScheme("odd2", clip_ratio=1e-7),
        embedding=WeightScheme("p2n4096", None, "nearest", "rms"),
        head=WeightScheme("int8", 32),
        rotate="folded",
        hadamard=256,
        expand="auto",
        expand_mlp=128,
        rotate_output=False,
        fit_groups=True,
        center_keys=True,
        compensate="plain",
        search=Search(method="gbs", source="naïve.txt", iterations=4),
        overrides=(
            Override(pattern="*.down_proj", weight=WeightScheme("int4"), input=None),
            Override(pattern="model.layers.0.*", keep=True),
            Override(pattern="*.self_attn", values=None),
        ),
        dtype="bfloat16",
        seed=7,
    )


def as_yaml(recipe):
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@pytest.mark.parametrize("recipe", [Recipe(), full_recipe(), preset("w3a3kv3")])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_give_the_same_recipe_back(tmp_path, recipe, suffix):
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(as_yaml(recipe) if suffix == "yaml" else recipe.model_dump_json(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_hash_sees_what_was_given():
    recipe = full_recipe()
    assert recipe.model_copy(update={"seed": 8}).hash() != recipe.hash()
    # The same values, given and null in one, left out in the other.
    given, other = Override(pattern="*", weight=None), Override(pattern="*", input=None)
    assert Recipe(overrides=(given,)).hash() != Recipe(overrides=(other,)).hash()


def test_recipes_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().seed = 3  # pyright: ignore
    assert hash(full_recipe()) == hash(full_recipe())


# Presets


def test_packaged_methods():
    assert preset_methods() == [
        "balanced",
        "bwa",
        "gbs",
        "higgs",
        "paley",
        "quarot",
        "quarot-clipped",
        "rtn",
        "vectors",
    ]


def test_binary_weights_have_short_names():
    w1a4, w1a16 = preset("w1a4"), preset("w1a16")
    assert w1a4 == preset("bwa-w1a4kv4")
    assert w1a4.weights is not None
    assert w1a4.inputs is not None
    assert (w1a4.weights.grid.name, w1a4.inputs.grid.name, w1a4.keys.grid.name) == ("free2", "uint4", "uint4")
    assert w1a16.weights == w1a4.weights
    assert w1a16.inputs is w1a16.keys is w1a16.values is None
    assert preset("w1g64a4").weights.group_size == preset("w1g64a4").inputs.group_size == 64
    assert preset("w1a4kv16").keys is None


def test_a_group_written_by_hand_is_not_fitted():
    assert preset("w1a4").fit_groups
    assert preset("w1a16").fit_groups
    assert not preset("w1g64a4").fit_groups
    assert not preset("w4g64a16").fit_groups
    fits = {
        ("inputs.group_size=64",): False,
        ("weights={grid: free2, group_size: 64, scale_search: em}",): False,
        ("weights.group_size=64", "fit_groups=true"): True,
        ("fit_groups=true", "weights.group_size=64"): True,
        ("weights.group_size=null", "weights.sweeps=0"): True,
        ("weights={grid: int4}", "inputs=null"): True,
        ("keys.group_size=4",): True,
        ("overrides=[{pattern: '*', weight: {grid: int4, group_size: 64}}]",): True,
    }
    for settings, fitted in fits.items():
        assert apply_settings(preset("w1a4"), settings).fit_groups == fitted


@pytest.mark.parametrize("method", ["balanced", "gbs", "higgs", "paley", "quarot", "quarot-clipped", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_method_loads_at_every_width(method, bits):
    recipe = preset(f"{method}-w{bits}a{bits}kv{bits}")
    for scheme in (recipe.weights, recipe.inputs, recipe.keys, recipe.values):
        assert scheme is not None
        assert scheme.grid.bits == bits


@pytest.mark.parametrize(("bits", "best"), [(2, "trellis2"), (5, "trellis5"), (6, "trellis6"), (8, "p1n256")])
def test_weights_are_on_trellis_codes_where_there_are_some(bits, best):
    assert preset(f"w{bits}a8kv4").weights == WeightScheme(best, scale_search="rms")


@pytest.mark.parametrize(
    ("name", "grid"),
    [("w4a16", "trellis6"), ("w7a16", "p1n128"), ("w4a16e5h5", "trellis5"), ("w2a16e3h3", "trellis3"),
     ("w5a16e8h8", "p1n256"), ("balanced-6", "trellis6"), ("vectors-w6a16", "p1n64"), ("higgs-4e4h4", "p2n256")],
)  # fmt: skip
def test_embedding_and_head_are_on_trellis_codes_if_the_weights_are(name, grid):
    recipe = preset(name)
    assert recipe.embedding is not None
    assert recipe.embedding.grid.name == grid
    assert recipe.embedding == recipe.head


def test_vectors_differ_from_the_default_by_grids_alone():
    default, vectors = preset("w3a4kv4"), preset("vectors-w3a4kv4")
    assert vectors.weights == WeightScheme("p4n4096", scale_search="rms")
    assert vectors == default.model_copy(
        update={key: getattr(vectors, key) for key in ("weights", "embedding", "head")}
    )


@pytest.mark.parametrize(
    ("name", "grid"), [("higgs-2", "p2n16"), ("higgs-3", "p2n64"), ("higgs-3.25", "p2n88"), ("HIGGS-4", "p2n256")]
)
def test_higgs_for_weights_alone(name, grid):
    recipe = preset(name)
    assert recipe.weights == WeightScheme(grid, None, "nearest", "unbiased")
    assert (recipe.inputs, recipe.keys, recipe.values) == (None, None, None)
    assert (recipe.rotate, recipe.hadamard, recipe.search.method) == ("online", 1024, "none")


def test_balanced_is_higgs_with_a_diagonal_on_text_of_its_own():
    balanced, higgs = preset("balanced-5.5e8h8"), preset("higgs-5.5e8h8")
    text = {"calibration": Calibration(source="self", sequences=16, seq_len=128), "test": Test(source="pydoc")}
    assert balanced == higgs.model_copy(update={"diagonal": True, **text})


@pytest.mark.parametrize(
    ("name", "grid"), [("balanced-2", "trellis2"), ("balanced-3.25", "trellis3"), ("balanced-4.5", "p2n512")]
)
def test_balanced_has_the_grid_of_least_error_within_its_bits(name, grid):
    assert preset(name).weights == WeightScheme(grid, None, "nearest", "unbiased")


@pytest.mark.parametrize("name", ["higgs-0.5", "higgs-9"])
def test_higgs_says_what_it_reaches(name):
    with pytest.raises(PaleyError, match="HIGGS in two dimensions reaches 1 to 6 bits"):
        preset(name)


def test_the_facts_of_rtn():
    recipe = preset("rtn-w4a4kv4")
    assert recipe.weights == WeightScheme("int4", None, "nearest", "absmax")
    assert recipe.inputs == recipe.keys == recipe.values == ActivationScheme("int4", "absmax", 1.0)
    assert (recipe.rotate, recipe.search.method, recipe.compensate) == ("none", "none", "plain")


def test_the_facts_of_quarot():
    recipe = preset("quarot-w3a3kv3")
    assert recipe.weights == WeightScheme("int3", None, "gptq", "mse", sweeps=0)
    assert recipe.inputs == recipe.keys == recipe.values == ActivationScheme("int3", "absmax", 1.0)
    assert (recipe.rotate, recipe.search.method, recipe.compensate) == ("folded", "none", "plain")


def test_quarot_clipped_is_quarot_but_for_its_activations():
    clipped = preset("quarot-clipped-w3a3kv3")
    assert clipped.inputs == ActivationScheme("int3", clip_ratio=0.9)
    assert clipped.keys == clipped.values == ActivationScheme("uint3", clip_ratio=0.95)
    plain = preset("quarot-w3a3kv3")
    same = {"inputs": plain.inputs, "keys": plain.keys, "values": plain.values}
    assert clipped.model_copy(update=same) == plain


def test_the_default_is_gbs_without_a_search_on_trellis_codes_and_inputs_rotated_at_run_time():
    default, gbs = preset("vectors-W3A4KV2"), preset("gbs-w3a4kv2")
    assert preset("w3a4kv2") == preset("paley-w3a4kv2")
    assert (default.rotate, default.diagonal, default.search.method) == ("auto", "auto", "none")
    changes = {key: getattr(gbs, key) for key in ("rotate", "diagonal", "search")}
    assert default.model_copy(update=changes) == gbs


@pytest.mark.parametrize(
    ("name", "settings", "rotation", "diagonal"),
    [
        ("w4a4kv4", [], "online", True),
        ("w3a4kv4", [], "online", True),
        ("w4a8kv8", [], "online", True),
        ("w4a16", [], "online", True),
        ("w4a8kv8", ["weights.method=nearest"], "online", False),  # needs no text
        ("w16a16kv4", [], "online", False),
        ("w4a4kv4", ["expand=64"], "folded", False),
        ("w4a4kv4", ["rotate=folded"], "folded", False),
        ("w4a4kv4", ["diagonal=false"], "online", False),
        ("w4a16", ["diagonal=true"], "online", True),
        ("higgs-w4a4", [], "online", False),  # needs no text
        ("balanced-4", [], "online", True),
    ],
)
def test_where_inputs_turn_and_have_a_diagonal(name, settings, rotation, diagonal):
    recipe = apply_settings(preset(name), settings)
    assert recipe.rotation == rotation
    assert recipe.wants_diagonal(recipe.linear_scheme("model.layers.0.mlp.up_proj", "linear")) == diagonal


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("w4a4k4v2", 4, 2),
        ("w16a16k3v16", 3, None),
        ("higgs-w4a16k16v4e6h6", None, 4),
        ("w1a4k3v2", 3, 2),
        ("w1a4", 4, 4),
    ],
)
def test_keys_and_values_may_have_bits_of_their_own(name, keys, values):
    made = preset(name)
    assert [s and s.grid.bits for s in (made.keys, made.values)] == [keys, values]


@pytest.mark.parametrize(("name", "meant"), [("w4a4k4", "w4a4kv4"), ("w4a4v3", "w4a4kv3"), ("w4a4kv4v2", "w4a4kv4")])
def test_keys_or_values_alone_are_no_name(name, meant):
    with pytest.raises(PaleyError, match=f"did you mean '{meant}'"):
        preset(name)


def test_a_fraction_of_input_bits_is_a_budget():
    made, whole = preset("w4a4.5kv4"), preset("w4a5kv4")
    assert whole.budget is None
    assert made.budget is not None
    assert made.budget.inputs == 4.5
    assert made.model_copy(update={"budget": None}) == whole
    assert preset("w4a4.0kv4") == preset("w4a4kv4")


def test_the_facts_of_gbs():
    recipe = preset("gbs-w3a4kv2")
    assert recipe.weights is not None
    assert recipe.inputs is not None
    assert recipe.keys is not None
    assert recipe.keys == recipe.values
    schemes = (recipe.weights, recipe.inputs, recipe.keys)
    assert [s.grid.bits for s in schemes] == [3, 4, 2]
    # Rotated weights and inputs are Gaussian, and their grid and scale are made for that.
    assert [s.grid.affine for s in schemes] == [False, False, True]
    assert (recipe.weights.method, recipe.inputs.scale) == ("gptq", "rms")
    assert (recipe.rotate, recipe.search.method, recipe.compensate) == ("folded", "gbs", "residual_stream")
    assert recipe.expand == 0
    assert recipe.expand_mlp == "auto"
    assert recipe.center_keys


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("w4a16", 6, 6),
        ("w3a3kv3", 6, 6),
        ("w8a8kv8", 8, 8),
        ("w4a16e4h5", 4, 5),
        ("w4a16e16h4", None, 4),
        ("w4a16e16h16", None, None),
        ("w16a8", None, None),
        ("w16a16e6h6", 6, 6),
        ("higgs-4", 6, 6),
        ("higgs-4e4", 4, 6),
        ("higgs-3.25e16h16", None, None),
        ("w1a4", 6, 6),
        ("rtn-w4a16", None, None),
        ("quarot-w4a4kv4", None, None),
        ("rtn-w4a16e8h8", 8, 8),
    ],
)
def test_embedding_and_head_have_bits_of_their_own(name, embedding, head):
    recipe = preset(name)
    assert [scheme and round(scheme.grid.bits) for scheme in (recipe.embedding, recipe.head)] == [embedding, head]


def test_an_override_may_name_embedding_and_head():
    overrides = "overrides=[{pattern: lm_head, weight: {grid: int8}}, {pattern: x, keep: true}]"
    recipe = apply_settings(preset("w4a4"), [overrides])
    assert recipe.linear_scheme("lm_head", "head") == LinearScheme(WeightScheme("int8"))  # what it reads is not rounded
    assert recipe.linear_scheme("x", "embedding") == LinearScheme()
    assert recipe.linear_scheme("y", "embedding") == LinearScheme(recipe.embedding)


def test_sixteen_bits_leave_unquantized():
    recipe = preset("W4g64A16")
    plain = preset("w4a4").weights
    assert plain is not None
    assert plain.group_size is None
    assert recipe.weights == dataclasses.replace(plain, group_size=64)
    assert recipe.inputs is recipe.keys is recipe.values is None
    assert recipe.search.method == "none"
    half = preset("gbs-w16a8")
    assert half.weights is None
    assert half.inputs is not None
    assert half.search.method == "gbs"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("w9a4", r"W9 has no grid; bits are 2 to 8, or 16 for unquantized"),
        ("w1a9", r"A9 has no grid"),
        ("rtn-w1a4", r"W1 and the method bwa need each other"),
        ("bwa-w2a4", r"W1 and the method bwa need each other"),
        ("w4a4kv12", r"KV12 has no grid"),
        ("w4a1.5", r"A1\.5 has no grid"),
        ("w4a8.5", r"A8\.5 has no grid"),
        ("w1a4.5", r"W1 takes whole bits of inputs, as in w1a5"),
        ("w4", r"^preset 'w4': .* did you mean 'w4a16'\? Names are \[METHOD-\]W<bits>.*, see `paley presets`$"),
        ("w4x16", r"did you mean 'w4a16'\?"),
        ("quarot-w4a4kx4", r"did you mean 'quarot-w4a4kv4'\?"),
        ("q4_k_m", r"did you mean 'w4a16'\?"),
        ("W4A16G128", r"did you mean 'w4g128a16'\?"),
        ("awq-4bit", r"did you mean 'w4a16'\?"),
        ("Q4_0", r"did you mean 'gguf-q4_0'\?"),
        ("", r"did you mean 'w4a16'\?"),
        ("gptq-w3a16", r"unknown method 'gptq'; did you mean 'w3a16'\? Methods are balanced, bwa, gbs"),
        ("w4a16e9", r"E9 has no grid; bits are 2 to 8, or 16 for unquantized"),
        ("w4a16h1", r"H1 has no grid"),
        ("w4a16h6e6", r"did you mean 'w4a16e6h6'\?"),
        ("w4a4 kv4", r"did you mean 'w4a4kv4'\?"),
        (
            "quaro-w4a4",
            r"unknown method 'quaro'; did you mean 'quarot'\? Methods are balanced, bwa, gbs, higgs, paley, quarot, ",
        ),
        ("../gbs-w4a4", r"unknown method '\.\./gbs'"),
        ("w4g0a4", r"group_size must be a positive integer"),
        ("w16g64a4", r"G64 is .*W16"),
    ],
)
def test_bad_preset_names(name, complaint):
    with pytest.raises(PaleyError, match=complaint):
        preset(name)


# Files


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected a mapping of keys to values, got null"),
        ("- 1", "expected a mapping of keys to values, got list"),
        ("rotte: true", "rotte: unknown key; did you mean 'rotate'"),
        ("inputs: {grid: int4, clip: 1.0}", r"inputs\.clip: unknown key; did you mean 'clip_ratio'"),
        ("search: {sequence: 8}", r"search\.sequence: unknown key; did you mean 'sequences'"),
        ("rotate: 1", r"rotate: should be 'auto', 'folded', 'online' or 'none' \(got 1, integer\)"),
        ("rotate: true", r"rotate: should be 'auto', 'folded', 'online' or 'none' \(got true, boolean\)"),
        ("rotate_output: 1", r"rotate_output: should be a valid boolean \(got 1, integer\)"),
        ("search: {sequences: '8'}", r"search\.sequences: should be a valid integer \(got \"8\", text\)"),
        (
            "search: {sequences: 0}",
            r"search\.sequences: should be greater than or equal to 1 \(got 0, integer\)",
        ),
        ("search: {method: gsb}", r"search\.method: should be 'none' or 'gbs' \(got \"gsb\", text\)"),
        ("expand: big", r"expand: should be a valid integer or should be 'auto' \(got \"big\", text\)"),
        ("expand: -1", r"expand: should be greater than or equal to 0"),
        ("weights: int4", r"weights: should be an object \(got \"int4\", text\)"),
        ("weights: {grid: int40}", r"weights\.grid: grid 'int40': bits must be between 2 and 8"),
        ("weights: {group_size: 64}", r"weights\.grid: is required and missing"),
        ("inputs: {grid: uint4, scale: rms}", "inputs: .*'uint4' has a zero point"),
        ("inputs: {grid: int4, clip_ratio: .nan}", r"inputs: .*clip_ratio must be in \(0, 4\]"),
        ("rotate: none\nexpand: 64", "need rotate: folded"),
        ("rotate: online\nexpand_mlp: 64", "need rotate: folded"),
        ("overrides: {pattern: a}", "overrides: should be a valid array"),
        ("overrides: [{pattern: a}]", r"overrides\[0\]: changes nothing for 'a'"),
        (
            "overrides: [{pattern: a, keep: true, weight: null}]",
            r"overrides\[0\]: keep leaves 'a' .*excludes weight",
        ),
        (
            "overrides: [{patern: a, keep: true}]",
            r"overrides\[0\]\.patern: unknown key; did you mean 'pattern'",
        ),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("seed: [", "is not valid YAML"),
        ("seed: 2020-01-01", "not plain data .*date"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML .*python/object"),
        ("calibration: {source: ''}", r"calibration\.source: .*at least 1 character"),
        ("test: {seq_len: 1}", r"test\.seq_len: should be greater than or equal to 2"),
    ],
)
def test_bad_recipes(tmp_path, text, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PaleyError, match=rf"bad\.yaml: .*{complaint}"):
        load_recipe(path)


def test_bad_json_recipes(tmp_path):
    path = tmp_path / "bad.json"
    for text, complaint in (
        ('{"seed": 1,}', r"bad\.json: is not valid JSON \(line 1, column 1"),
        ('{"seed": 1, "seed": 1}', r"bad\.json: the key 'seed' is given twice"),
        ("[" * 100_000, r"bad\.json: "),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PaleyError, match=complaint):
            load_recipe(path)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(PaleyError, match=r"none\.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(PaleyError, match="cannot be read as a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9")
    with pytest.raises(PaleyError, match=r"latin\.yaml: is not UTF-8 text \(byte 6\)"):
        load_recipe(tmp_path / "latin.yaml")


# Settings


def test_settings():
    base = preset("w3a3kv3")
    assert apply_settings(base, []) is base
    changed = apply_settings(
        base,
        [
            "search.sequences=8",
            "inputs.clip_ratio=0.85",
            "weights=null",
            "search.method=none",
            "test.source=a=b.txt",
            "overrides=[{pattern: '*.o_proj', keep: true}]",
        ],
    )
    assert changed.search.sequences == 8
    assert base.inputs is not None
    assert changed.inputs == dataclasses.replace(base.inputs, clip_ratio=0.85)
    assert changed.inputs != base.inputs
    assert changed.weights is None
    assert changed.search.method == "none"
    assert changed.test.source == "a=b.txt"
    assert changed.overrides == (Override(pattern="*.o_proj", keep=True),)
    assert changed.keys == base.keys
    assert base == preset("w3a3kv3")
    # Only together are these a recipe.
    wide = apply_settings(base, ["expand=64", "expand_mlp=0"])
    assert apply_settings(wide, ["rotate=none", "expand=0"]).rotate == "none"
    with pytest.raises(PaleyError, match="need rotate: folded"):
        apply_settings(wide, ["rotate=none"])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("serch.method=none", "unknown key serch; did you mean 'search'"),
        ("search.methd=none", r"unknown key search\.methd; did you mean 'method'"),
        ("inputs.clip=1.0", r"unknown key inputs\.clip; did you mean 'clip_ratio'"),
        ("search.sequences=many", r"search\.sequences: should be a valid integer \(got \"many\", text\)"),
        ("inputs.clip_ratio=7", r"inputs: .*clip_ratio must be in \(0, 4\], got 7"),
        ("keys.grid=int4", r"keys is null and has no key 'grid'; set keys as a whole"),
        ("seed.x=4", "seed is int and has no key 'x'"),
        ("overrides.0=4", "overrides is list"),
        ("seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("seed=[", "setting 'seed=\\[': is not valid YAML"),
    ],
)
def test_bad_settings(setting, complaint):
    with pytest.raises(PaleyError, match=complaint):
        apply_settings(preset("w4a4"), [setting])


# Schemes


def test_overrides_change_what_they_name_in_order():
    recipe = Recipe(
        weights=WeightScheme("int4"),
        inputs=ActivationScheme("int4"),
        keys=ActivationScheme("int3"),
        values=ActivationScheme("int3"),
        overrides=(
            Override(pattern="*.down_proj", input=None),
            Override(pattern="m.0.*", weight=WeightScheme("int8"), values=None),
            Override(pattern="m.1.*", keep=True),
        ),
    )
    turn = Transform(8, 8, 8)
    assert recipe.linear_scheme("m.5.up_proj", "linear") == LinearScheme(recipe.weights, recipe.inputs)
    assert recipe.linear_scheme("m.5.down_proj", "linear", turn) == LinearScheme(recipe.weights, None, turn)
    assert recipe.linear_scheme("m.0.down_proj", "linear", turn) == LinearScheme(WeightScheme("int8"), None, turn)
    assert recipe.linear_scheme("m.1.down_proj", "linear", turn) == LinearScheme(None, None, turn)
    assert recipe.attention_scheme("m.0.attn", turn) == AttentionScheme(recipe.keys, None, turn)
    assert recipe.attention_scheme("m.1.attn") == AttentionScheme(None, None)
    recipe.check_overrides(["m.0.down_proj", "m.1.down_proj"], ["m.0.attn"])
    with pytest.raises(PaleyError, match=r"override 'm\.1\.\*' with keep fits none of the 2 modules"):
        recipe.check_overrides(["m.0.down_proj"], ["m.0.attn"])
    with pytest.raises(PaleyError, match=r"override '\*\.down_proj' with input .*did you mean 'm\.0\.down_pro'"):
        recipe.check_overrides(["m.0.down_pro"], ["m.0.down_proj"])


def test_groups_are_fitted_to_a_width_but_for_those_of_overrides():
    settings = ["inputs.group_size=64", "fit_groups=true"]
    overrides = "overrides=[{pattern: down, weight: {grid: int4, group_size: 48}}, {pattern: up, input: {grid: int4}}]"
    made = apply_settings(preset("w1a4"), [*settings, overrides])

    def groups(recipe, name, width):
        scheme = recipe.linear_scheme(name, "linear", width=width)
        return scheme.weight.group_size, scheme.input.group_size

    assert groups(made, "q", 320) == (160, 64)
    assert groups(made, "q", 48) == (48, 48)
    assert groups(made, "q", None) == (128, 64)
    assert groups(made, "down", 320) == (48, 64)
    assert groups(made, "up", 320) == (160, None)
    assert groups(made.model_copy(update={"fit_groups": False}), "q", 320) == (128, 64)
    rows = apply_settings(made, ["weights.group_size=null", "inputs=null", "overrides=[]"])
    assert rows.linear_scheme("q", "linear", width=320) == LinearScheme(rows.weights)


def test_yaml_is_plain():
    assert yaml.safe_load(as_yaml(full_recipe()))["overrides"][1] == {
        "pattern": "model.layers.0.*",
        "keep": True,
    }


def test_outliers_can_be_set_layer_by_layer():
    settings = ["outliers=4", "overrides=[{pattern: '*down*', outliers: 9}, {pattern: '*o_proj', weight: null}]"]
    made = apply_settings(preset("rtn-w2a4"), settings)
    schemes = [made.linear_scheme(name, "linear") for name in ("q_proj", "down_proj", "o_proj")]
    assert [scheme.outliers for scheme in schemes] == [4, 9, 0]
    assert load_recipe_text(made) == made
    vectors = apply_settings(made, ["overrides=[{pattern: '*', weight: {grid: p2n16, scale_search: rms}}]"])
    with pytest.raises(PaleyError, match=r"q_proj: linear scheme: .*stands for 2 columns"):
        vectors.linear_scheme("q_proj", "linear")
    with pytest.raises(PaleyError, match="no weight is: set outliers: 0"):
        apply_settings(preset("w16a8"), ["outliers=4"])


def load_recipe_text(recipe):
    return Recipe.model_validate(yaml.safe_load(as_yaml(recipe)))


def test_settings_travel_as_values():
    recipe = preset("w4a4kv4")
    assert apply_settings(recipe, [("seed", 3), ("test", None), ("calibration.source", "a: b.txt")]) == apply_settings(
        recipe, ["seed=3", "test=null", "calibration.source='a: b.txt'"]
    )
    with pytest.raises(PaleyError, match=r"setting 'sede=3': unknown key sede; did you mean 'seed'"):
        apply_settings(recipe, [("sede", 3)])


def test_a_budget_takes_its_limits_as_they_are():
    limit = 0.1 + 0.2
    recipe = under_budget(preset("w4a16"), weights=limit)
    assert recipe.budget == Budget(weights=limit)
    assert under_budget(recipe, kv=4).budget == Budget(weights=limit, kv=4)
    with pytest.raises(PaleyError, match=r"^budget\.weights: should be greater than 0 \(got 0, integer\)$"):
        under_budget(weights=0)


@pytest.mark.parametrize(
    ("limits", "quantized"), [({"weights": 3}, "w"), ({"kv": 4}, "kv"), ({"size": 9, "kv": 4}, "w kv")]
)
def test_a_budget_alone_quantizes_what_it_limits(limits, quantized):
    recipe = under_budget(**limits)
    assert (recipe.weights is not None) == ("w" in quantized)
    assert (recipe.keys is not None) == ("kv" in quantized)
    assert recipe.inputs is None
