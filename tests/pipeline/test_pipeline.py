import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from paley import hf
from paley.core import files
from paley.core.errors import PaleyError
from paley.pipeline import make_plan, quantize
from paley.plan import Plan
from paley.recipe import apply_settings, preset

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "dogs",
    "do",
    "not",
    "sing",
    "in",
    "tune",
    "when",
    "rain",
    "falls",
    "over",
    "old",
    "stone",
    "towns",
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=60)) for _ in range(60)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(documents))
    return file


def recipe(text, name="gbs-w3a3kv3", *more):
    sizes = [f"{part}.sequences=4" for part in ("calibration", "search", "test")]
    lengths = [f"{part}.seq_len=32" for part in ("calibration", "search", "test")]
    return apply_settings(preset(name), [f"calibration.source={text}", "search.iterations=1", *sizes, *lengths, *more])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def done(model_folder, text, tmp_path_factory):
    """One finished run, and everything it wrote."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("done") / "out"
    outcome = quantize(model_folder, recipe(text), output=output)
    return outcome, contents(output)


def test_what_it_leaves(done, model_folder):
    outcome, written = done
    assert {
        "config.json",
        "digests.json",
        "model.safetensors",
        "plan.json",
        "results.json",
        "README.md",
        "tokenizer.json",
    } <= set(written)
    assert not outcome.output.with_name("out.run").exists()
    results = outcome.results
    assert results.evaluation.kl > 0
    assert results.bytes == len(written["model.safetensors"]) - _header(written["model.safetensors"])
    assert results.bits_per_weight == pytest.approx(results.bytes * 8 / results.parameters)
    assert set(results.untouched) == {"norms and biases", "mean keys"}
    assert len(results.layers) == 14 + 2  # embedding and head
    # Every activation slot was searched, and the plan keeps every trial.
    assert len({t.slot for t in outcome.plan.trace}) == 12
    assert Plan.load(outcome.output / "plan.json") == outcome.plan


def _header(data):
    return 8 + int.from_bytes(data[:8], "little")


def test_transformers_alone_reads_it(done):
    outcome, _ = done
    hf.register()
    ids = torch.arange(3, 40)[None]
    ours = hf.load(outcome.output)(ids).logits
    stock = AutoModelForCausalLM.from_pretrained(outcome.output, dtype=torch.float32)(ids).logits
    assert torch.equal(ours, stock)


def test_the_plan_alone_gives_the_same_bytes(done, model_folder, text, tmp_path):
    outcome, written = done
    again = quantize(model_folder, plan=outcome.plan, output=tmp_path / "again")
    assert contents(again.output)["model.safetensors"] == written["model.safetensors"]


@pytest.mark.parametrize("name", ["gbs-w3a3kv3", "w3a3kv3", "w4a16", "rtn-w4a4kv4"])
def test_a_run_without_scores_gives_the_same_bytes(name, model_folder, text, tmp_path):
    scored, bare = (
        quantize(model_folder, recipe(text, name, *unscored), output=tmp_path / str(len(unscored)))
        for unscored in ([], ["test=null"])
    )
    assert scored.results.evaluation is not None
    assert bare.results.evaluation is None
    assert contents(bare.output)["model.safetensors"] == contents(scored.output)["model.safetensors"]


def test_deciding_alone_gives_the_same_plan(done, model_folder, text):
    plan = make_plan(model_folder, recipe(text))
    kept = done[0].plan
    assert (plan.linears, plan.attentions, plan.trace) == (kept.linears, kept.attentions, kept.trace)


def test_a_finished_run_resumes_to_itself(done, model_folder, text):
    outcome, written = done
    quantize(model_folder, recipe(text), output=outcome.output, resume=True)
    assert contents(outcome.output) == written


def _damaged_copy(done, output):
    """The finished folder with a broken file in it; results.json still says that all is well."""
    shutil.copytree(done[0].output, output)
    (output / "model.safetensors").write_bytes(b"broken")


def test_overwrite_makes_everything_anew(done, model_folder, text, tmp_path):
    _damaged_copy(done, tmp_path / "out")
    quantize(model_folder, recipe(text), output=tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == done[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_overwrite_resumes_to_a_new_output(done, model_folder, text, tmp_path, monkeypatch):
    _damaged_copy(done, tmp_path / "out")
    _stop_in_the_middle(model_folder, text, tmp_path / "out", monkeypatch, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"broken"  # until there is a better one
    quantize(model_folder, recipe(text), output=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == done[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name", ["w4a16", "w16a4", "w4g8a8kv4", "rtn-w4a4kv4", "quarot-w4a4kv4", "quarot-clipped-w2a4kv2"]
)
def test_other_presets(name, model_folder, text, tmp_path):
    results = quantize(model_folder, recipe(text, name), output=tmp_path / "out").results
    assert results.evaluation.kl < 1
    if name == "w16a4":
        assert results.bits_per_quantized_weight is None
        assert results.bits_per_weight >= 16


def test_expansion_is_stored_and_counted(model_folder, text, tmp_path):
    wide = quantize(
        model_folder, recipe(text, "gbs-w4a4kv4", "search.method=none", "expand=8"), output=tmp_path / "wide"
    )
    plain = quantize(model_folder, recipe(text, "gbs-w4a4kv4", "search.method=none"), output=tmp_path / "plain")
    assert json.loads((wide.output / "config.json").read_text())["hidden_size"] == 32
    assert wide.results.bits_per_weight > plain.results.bits_per_weight


def test_rotation_alone_leaves_an_ordinary_wider_checkpoint(model_folder, text, tmp_path):
    wanted = recipe(text, "w16a16", "expand=12", "dtype=float32")
    output = quantize(model_folder, wanted, output=tmp_path / "out").output
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    wide = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert wide.config.hidden_size == 36
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits
    torch.testing.assert_close(wide(ids).logits, plain, rtol=1e-4, atol=1e-5)


def test_self_written_text_calibrates(model_folder, text, tmp_path):
    wanted = recipe(text, "w4a4kv4", "calibration.source=self", f"test.source={text}")
    assert quantize(model_folder, wanted, output=tmp_path / "out").results.evaluation.source == str(text)
    with pytest.raises(PaleyError, match="the model wrote itself"):
        quantize(model_folder, recipe(text, "w4a4kv4", "calibration.source=self"), output=tmp_path / "no")


# --- refusals: nothing written, nothing lost ---------------------------------------------------------------


def test_an_existing_output_is_kept(model_folder, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for flags in ({}, {"resume": True}):
        with pytest.raises(PaleyError, match="exists already"):
            quantize(model_folder, recipe(text), output=tmp_path / "out", **flags)
    assert contents(tmp_path / "out") == {"mine.txt": b"precious"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_stands_in_the_way_is_said_before_the_checkpoint_is_read(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("half.run").mkdir()
    for output, complaint in (
        (".", "exists already"),
        ("", "exists already"),
        ("out", "exists already"),
        ("out/..", "exists already"),
        ("half", "unfinished run"),
        ("/", "/: is no name for a new folder"),
    ):
        with pytest.raises(PaleyError, match=complaint):
            quantize("no model here", recipe(text), output=output)


def test_the_current_folder_and_the_model_are_not_replaced(model_folder, text, tmp_path, monkeypatch):
    copied = shutil.copytree(model_folder, tmp_path / "models" / "mine")
    inside = shutil.copytree(model_folder, tmp_path / "new.run" / "new")
    (tmp_path / "new.run" / "run.json").write_text('{"run": "another"}')  # else it is refused as a stranger's
    before = contents(tmp_path)
    with pytest.raises(PaleyError, match=r"new: is made in .*new\.run, which holds the model"):
        quantize(inside, recipe(text), output=tmp_path / "new", overwrite=True)
    for output in (copied, tmp_path / "models"):
        with pytest.raises(PaleyError, match=r"holds the model|was not made by Paley"):
            quantize(copied, recipe(text), output=output, overwrite=True)
    monkeypatch.chdir(copied)
    with pytest.raises(PaleyError, match=r"holds the current folder|was not made by Paley"):
        quantize(model_folder, recipe(text), output=".", overwrite=True)
    assert contents(tmp_path) == before


def test_a_plan_for_another_model_is_refused(done, model_folder, text, tmp_path):
    plan = done[0].plan.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(PaleyError, match="fingerprint"):
        quantize(model_folder, plan=plan, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_other_settings_is_not_resumed(model_folder, text, tmp_path, monkeypatch):
    _stop_in_the_middle(model_folder, text, tmp_path / "out", monkeypatch)
    with pytest.raises(PaleyError, match="unfinished run"):
        quantize(model_folder, recipe(text), output=tmp_path / "out")
    with pytest.raises(PaleyError, match="other settings"):
        quantize(model_folder, recipe(text, "w4a4kv4"), output=tmp_path / "out", resume=True)
    quantize(model_folder, recipe(text, "w4a4kv4"), output=tmp_path / "out", overwrite=True)


def _stop_in_the_middle(model_folder, text, output, monkeypatch, **flags):
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr("paley.pipeline.run.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(model_folder, recipe(text), output=output, **flags)


def test_an_interrupted_run_goes_on_without_repeating(done, model_folder, text, tmp_path, monkeypatch):
    _stop_in_the_middle(model_folder, text, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("paley.model.calibrate.ModelQuantizer._codes", None)  # would fail if anything was redone
    monkeypatch.setattr("paley.model.search.ClipSearch._loss", None)
    quantize(model_folder, recipe(text), output=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == done[1]


def test_a_second_run_on_the_same_output_is_refused(model_folder, text, tmp_path, monkeypatch):
    def second(*args, **kwargs):
        with pytest.raises(PaleyError, match="another run is at work"):
            quantize(model_folder, recipe(text), output=tmp_path / "out", resume=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("paley.pipeline.run.save_checkpoint", second)
    with pytest.raises(KeyboardInterrupt):
        quantize(model_folder, recipe(text), output=tmp_path / "out")


def test_a_full_disk_leaves_no_output(model_folder, text, tmp_path, monkeypatch):
    def full(file, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(PaleyError, match=r"(?i)space|full"):
            quantize(model_folder, recipe(text), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_back_differently_is_not_published(model_folder, text, tmp_path, monkeypatch):
    def tampered(path, **settings):
        model = load(path, **settings)
        model.lm_head.weight.data[0, 0] += 1e-3
        return model

    load = hf.load
    monkeypatch.setattr(hf, "load", tampered)
    with pytest.raises(PaleyError, match="differs from the one in memory"):
        quantize(model_folder, recipe(text, "w4a4kv4e16h16"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_float16_cannot_hold_is_named(model_folder, text, tmp_path):
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.model.embed_tokens.weight.data *= 1e7
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (broken / file).write_bytes((model_folder / file).read_bytes())
    with pytest.raises(PaleyError, match=r"embed_tokens.*float16.*dtype=float32"):
        quantize(broken, recipe(text, "rtn-w4a16"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- kill -9 ------------------------------------------------------------------------------------------------


def _child(model_folder, wanted, output):
    torch.set_num_threads(1)
    quantize(model_folder, wanted, output=output, resume=True)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(done, model_folder, text, tmp_path):
    """Chains of kills and resumes; every finished output is byte for byte that of an undisturbed run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paley"])
    rng, kills, finished = random.Random(0), 0, 0
    wanted = recipe(text)
    while kills < 20:
        output = tmp_path / f"out{finished}"
        child = context.Process(target=_child, args=(model_folder, wanted, output))
        child.start()
        child.join(rng.uniform(0.05, 1.5))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if child.exitcode == 0:
            assert contents(output) == done[1]
            finished += 1
        else:
            assert child.exitcode == -signal.SIGKILL
            assert not output.exists() or contents(output) == done[1]  # never half an output
    quantize(model_folder, wanted, output=output, resume=True)
    assert contents(output) == done[1]
