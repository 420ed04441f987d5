"""`paley.generate`, `score` and `inspect`: what the command line prints, as values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paley
from paley.model.folders import load_tokenizer
from paley.recipe import apply_settings
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("use")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} is a number and {n * n} is its square." for n in range(2000)))
    model = save_tiny(folder / "model", tiny_tokenizer)
    recipe = apply_settings(paley.preset("higgs-4"), [f"test.source={text}", "test.seq_len=32"])
    outcome = paley.quantize(model, recipe, output=folder / "out")
    return model, outcome, text


def test_score_repeats_what_the_run_measured(made):
    model, outcome, _ = made
    assert paley.score(outcome.output, model) == outcome.results.evaluation


def test_score_speaks_of_its_own_arguments(made):
    _, outcome, text = made
    with pytest.raises(paley.PaleyError, match=r"use sequences=\d+, or a longer text, .*\(data\)"):
        paley.score(outcome.output, data=str(text), sequences=10**6)
    with pytest.raises(paley.PaleyError, match=r"^seq_len=\d+: this model reads .*; set seq_len=\d+, or less"):
        paley.score(outcome.output, data=str(text), seq_len=10**6)


def test_generate_draws_by_its_seed_and_leaves_torch_as_it_was(made):
    _, outcome, _ = made
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = [
        paley.generate(outcome.output, "A", max_new_tokens=20, temperature=2.0, seed=seed).text for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_generate_takes_a_model_in_memory_and_streams(made):
    _, outcome, _ = made
    model, tokenizer, pieces = paley.load(outcome.output), load_tokenizer(outcome.output), []
    found = paley.generate(model, "A", tokenizer=tokenizer, max_new_tokens=9, write=pieces.append)
    assert "".join(pieces) == found.text
    assert (found.prompt_tokens, found.tokens) == (1, 9)
    with pytest.raises(paley.PaleyError, match="give tokenizer="):
        paley.generate(model, "A")


def test_the_engine_starts_without_what_transformers_needs_for_models(made):
    """Half of the time to the first token went into that."""
    _, outcome, _ = made
    code = f"""if True:
        import sys, paley
        assert paley.generate({str(outcome.output)!r}, "A", max_new_tokens=2).engine == "native"
        heavy = ("transformers.modeling_utils", "torch._dynamo", "scipy", "paley.hf")
        print([name for name in heavy if name in sys.modules])"""
    environment = os.environ | {"PYTHONPATH": str(Path(paley.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def test_inspect_counts_every_byte(made):
    _, outcome, _ = made
    found = paley.inspect(outcome.output)
    assert sum(linear.bytes for linear in found.linears.values()) + sum(found.untouched_bytes.values()) == found.bytes
    assert found.results == outcome.results
    name, linear = next(iter(found.linears.items()))
    assert linear.rel_error == outcome.results.layers[name].rel_error
    assert linear.gaussian_error == pytest.approx(linear.rel_error, rel=0.2)


def test_inspect_shows_what_it_can_of_an_older_folder(made, tmp_path):
    _, outcome, _ = made
    older = tmp_path / "older"
    older.mkdir()
    for file in outcome.output.iterdir():
        (older / file.name).symlink_to(file)
    (older / "results.json").unlink()
    data = outcome.results.to_dict()
    del data["version"]
    (older / "results.json").write_text(json.dumps(data))
    found = paley.inspect(older)
    assert found.results is None
    assert found.bytes == outcome.results.bytes
    assert all(linear.rel_error is None and linear.excess is None for linear in found.linears.values())
