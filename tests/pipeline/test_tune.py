import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import paley
from command_line import paley_
from paley import kernels
from paley.core.errors import PaleyError
from paley.eval.reference import Reference
from paley.model import tuning
from paley.model.loading import open_source
from paley.pipeline import peak, quantize
from paley.pipeline.estimate import check_memory, estimate_run
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.texts import gather
from paley.pipeline.tune import original_head
from paley.recipe import Recipe, apply_settings, preset
from paley.report import gather as report_of
from tiny_models import save_tiny

TUNED = "tune={sequences: 64, rate: 0.004}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "old", "towns", "when", "rain", "falls", "and", "dogs", "sing"]
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(160)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(documents))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("tune") / "model", tiny_tokenizer, qwen=True, gains=True)


def recipe(text, name, *more) -> Recipe:
    lengths = [f"{part}.seq_len=128" for part in ("calibration", "test")]
    settings = ["calibration.sequences=8", "test.sequences=16", *lengths, f"calibration.source={text}", *more]
    return apply_settings(preset(name), ["search.method=none", *settings])


NAMES = {
    "w2a16": [],
    "w3a4kv4": ["hadamard=16"],
    "w3a16": ["weights={grid: int3, group_size: 8, scale_search: mse}", "rotate=none", "fit_groups=true"],
    "higgs-3": ["hadamard=16"],
    "w1a4": ["weights.group_size=16", "inputs.group_size=16", "fit_groups=true", "outliers=3", "rotate=none"],
}


@pytest.mark.parametrize("name", NAMES)
def test_kl_falls_and_no_code_moves(model, text, tmp_path, name):
    """At 4-bit inputs so small a model gains nothing: there KL must not rise by more than its error."""
    before = quantize(model, recipe(text, name, *NAMES[name]), output=tmp_path / "before")
    rough = name == "w3a4kv4"  # gradients pass over what rounding does to inputs
    tuned = TUNED.replace("0.004", "0.001") if rough else TUNED
    after = quantize(model, recipe(text, name, *NAMES[name], tuned), output=tmp_path / "after")
    kl, was = (made.results.evaluation.kl for made in (after, before))
    assert kl < (was + before.results.evaluation.kl_stderr if rough else 0.98 * was)
    assert after.results.bytes == before.results.bytes
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    assert {key: tensor.dtype for key, tensor in old.items()} == {key: tensor.dtype for key, tensor in new.items()}
    assert all(key.endswith((".scales", ".bias", "norm.weight")) for key in moved), moved
    assert any(key.endswith(".scales") for key in moved)
    assert any(key.endswith("norm.weight") for key in moved)
    assert any(key.endswith(".bias") for key in moved)
    assert "model.embed_tokens.scales" not in moved


def test_blocks_that_run_twice_give_the_same_bytes(model, text, tmp_path, monkeypatch):
    wanted = recipe(text, "w3a4kv4", "hadamard=16", "test=null", TUNED)
    quantize(model, wanted, output=tmp_path / "whole")
    monkeypatch.setattr(tuning, "ACTIVATIONS", 0)
    monkeypatch.setattr("paley.pipeline.tune.ACTIVATIONS", 0)
    quantize(model, wanted, output=tmp_path / "twice")
    whole, twice = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "twice"))
    assert all(torch.equal(whole[key], twice[key]) for key in whole)


def test_a_run_stopped_while_tuning_goes_on_to_the_same_bytes(model, text, tmp_path):
    wanted = recipe(text, "w2a16", "test=null", TUNED)
    quantize(model, wanted, output=tmp_path / "whole")

    class Stops(Monitor):
        def step(self, detail=""):
            if detail.startswith("KL"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, wanted, output=tmp_path / "out", monitor=Stops())
    assert not (tmp_path / "out").exists()
    made = list((tmp_path / "out.run" / "final").iterdir())
    assert made
    quantize(model, wanted, output=tmp_path / "out", resume=True)
    names = ("model.safetensors", "config.json", "digests.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_its_text_is_apart_from_the_calibrations_which_stays(model, text):
    source = open_source(model)
    untuned, tuned = (gather(recipe(text, "w2a16", *more), source) for more in ((), (TUNED,)))
    assert untuned.tuning is None
    assert torch.equal(untuned.calibration.ids, tuned.calibration.ids)
    assert tuned.tuning.ids.shape == (64, 128)
    rows = set(map(tuple, tuned.calibration.ids.tolist()))
    assert not rows & set(map(tuple, tuned.tuning.ids.tolist()))


def test_a_text_too_short_says_how_many_sequences_it_has(model, text):
    with pytest.raises(PaleyError, match=r"use tune.sequences=\d+, or a longer text"):
        gather(recipe(text, "w2a16", "tune={sequences: 100000}"), open_source(model))


def test_too_little_memory_is_refused_with_what_it_takes_without(model, text):
    wanted = recipe(text, "w2a16", "test=null", TUNED)
    problem = resolve(open_source(model), wanted)
    needed = estimate_run(problem, wanted).memory
    untuned = estimate_run(problem, wanted.model_copy(update={"tune": None})).memory
    assert untuned < needed
    check_memory(problem, wanted, needed, free=needed)
    with pytest.raises(PaleyError, match=r"tuning needs about .* leave it out \(tune=null\)"):
        check_memory(problem, wanted, needed, free=(untuned + needed) // 2)


def test_a_loss_that_is_not_finite_names_step_and_remedy(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "kl_backward", lambda *_: float("nan"))
    with pytest.raises(PaleyError, match=r"tuning: the KL is nan at step 0, sequence .*; use a smaller tune\.rate"):
        quantize(model, recipe(text, "w2a16", "test=null", TUNED), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fast", [False, True])
def test_logits_of_the_original_have_more_than_eight_bits(fast, monkeypatch):
    if fast and kernels.backend() != "native":
        pytest.skip("without the native library nothing multiplies bfloat16")
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: fast)
    rng = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=rng).bfloat16() * 2 for n in (9, 50))
    bias = torch.randn(50, generator=rng)
    reference = Reference(hidden.float()[None], head, torch.zeros(1, 8), "text", "0" * 64, bias)
    exact = hidden.double() @ head.double().T + bias
    made = original_head(reference)(reference.hidden[0])
    assert made.dtype == torch.float32
    assert float(exact.abs().max()) > 64  # where bfloat16 numbers are .5 apart
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["w2a16", "higgs-3"])
def test_the_estimate_is_that_of_a_model_held_whole_and_without_states(model, text, monkeypatch, name):
    wanted = recipe(text, name, *NAMES[name], "test=null", TUNED)
    problem = resolve(open_source(model), wanted)
    assert problem.source.has_pages
    monkeypatch.setattr(peak, "COSTS", replace(peak.COSTS, model=1000.0))  # else blocks as large as these count more
    found = estimate_run(problem, wanted)
    assert found.memory > 4000 * sum(site.numel for site in problem.sites.weights)
    assert found.states == 0
    assert "beside it until it is done" not in str(found)


def test_weights_kept_of_an_earlier_folder_keep_their_codes_alone(model, text, tmp_path):
    plain = recipe(text, "w2a16", "test=null")
    old = quantize(model, plain, output=tmp_path / "old").output
    shown = paley_("quantize", model, "--from", old, "--set", TUNED, "--output", tmp_path / "new")
    assert f"kept 15 of 15 weights of {old}, the same codes, as a run from the beginning would" in shown.err
    assert f"kept from {old}: 15 weights, the same codes" in shown.out
    files = (load_file(folder / "model.safetensors") for folder in (old, tmp_path / "new"))
    before, after = ({k: v for k, v in tensors.items() if k.endswith((".codes", ".scales"))} for tensors in files)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(moved) == 14
    assert all(key.endswith(".scales") for key in moved)


def test_errors_from_before_the_tuning_are_not_told(model, text, tmp_path):
    made = quantize(model, recipe(text, "w2a16e8h8", "test=null", "hadamard=16", TUNED), output=tmp_path / "out")
    layers = made.results.layers
    tuned = [name for name in layers if name != "model.embed_tokens"]
    assert [name for name, layer in layers.items() if layer.rel_error is None] == tuned
    assert layers["model.embed_tokens"].rel_error > 0  # whose scales stay
    assert paley.inspect(made.output).tuned == tuned
    shown = paley_("inspect", made.output).out
    assert f"tuned: {len(tuned)} layers, whose scales moved after rounding and have no rel_error since" in shown
    assert sum(" tuned " in line for line in shown.splitlines()) == len(tuned)
    figure = next(figure for figure in report_of(made.output).figures if figure.id == "error")
    assert [row[0] for row in figure.rows] == ["model.embed_tokens"]
    assert f"{len(tuned)} layers are left out, whose scales were tuned" in figure.words
