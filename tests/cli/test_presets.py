"""`paley presets`: what is listed, and what a wrong name is answered."""

from __future__ import annotations

import json

import pytest

from command_line import paley_
from paley.recipe import preset
from paley.recipe.presets import LISTED, measured


def test_every_listed_name_is_one_and_is_shown():
    shown = paley_("presets").out
    figures = measured()["presets"]
    assert figures.keys() <= LISTED.keys()
    assert "gguf-q4_0 (llama.cpp, 4.5 bits)" in shown
    for name in LISTED:
        preset(name)
        row = next(line for line in shown.splitlines() if line.split()[:1] == [name])
        if name in figures:
            assert row.split()[-1] == f"{figures[name]['kl']:.3f}"


def test_json_has_figures_and_recipes():
    found = json.loads(paley_("presets", "--json").out)
    assert [entry["name"] for entry in found["presets"]] == list(LISTED)
    shown = found["presets"][list(LISTED).index("w4a16")]
    assert shown["bits_per_weight"] == measured()["presets"]["w4a16"]["bits_per_weight"]
    assert found["targets"]["gguf-q4_0"]["weights"]["scale_search"] == "signed_diagonal"
    assert found["methods"]["quarot-w4a4kv4"]["weights"]["method"] == "gptq"


def test_one_name_shows_its_recipe():
    assert '"weights": {"grid": "trellis4"' in paley_("presets", "w4a16").out
    assert json.loads(paley_("presets", "w4a16", "--json").out)["recipe"] == preset("w4a16").model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("w4", "w4a16"),
        ("gguf-q4_k_m", "gguf-q4_1"),
        ("mlx-7", "mlx-8"),
        ("q4_k_m", "w4a16"),
        ("w3a3k3", "w3a3kv3"),
        ("W4A16G128", "w4g128a16"),
        ("Q8_0", "gguf-q8_0"),
        ("q5_0", "gguf-q5_0"),
        ("Q3_K_S", "w3a16"),
        ("Q6_0", "w6a16"),
        ("AWQ-w4g128", "w4g128a16"),
        ("fp8", "w8a16"),
        ("higgs4", "higgs-w4a16"),
        ("iq2_xxs", "w2a16"),
        ("nf4", "w4a16"),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(name, nearest):
    assert f"did you mean '{nearest}'?" in paley_("presets", name, code=2).err
