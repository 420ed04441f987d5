"""A model of which one block at a time is in memory: the same bytes, scores and logits as of a whole one."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from test_experts import save_with_idle_experts
from test_sources import Notes

from every_type import save_type
from paley import hf
from paley.core.errors import PaleyError
from paley.data import blocks_from_ids
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.loading import Source, open_source
from paley.model.pages import Pages
from paley.pipeline import estimate as estimating
from paley.pipeline import peak, saving
from paley.pipeline import run as running
from paley.pipeline import states as stating
from paley.pipeline.execute import execute
from paley.pipeline.monitor import Monitor
from paley.pipeline.paged import page_original
from paley.pipeline.resolve import resolve
from paley.pipeline.run import quantize
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.saving import load_stored, save_checkpoint, stored_tensors
from paley.pipeline.states import States
from paley.recipe import apply_settings, preset
from tiny_models import change_tensors, save_tiny

IDS = torch.randint(5, 127, (9, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = blocks_from_ids(IDS, "calibration", "some")
PRESETS = ["w4a16", "w4a8kv8", "w4a4kv4", "gbs-w3a3kv3", "quarot-w4a4kv4", "w1a4"]
KINDS = {"llama": {}, "qwen": {"qwen": True, "gains": True}, "gemma": {"gemma": True}}
WIDTH = 40  # of MLPs: one that a Hadamard matrix has


def problem_of(folder, name: str, *settings: str):
    settings = ("test=null", "search.method=none", "hadamard=16", *settings)
    return resolve(open_source(folder), apply_settings(preset(name), settings))


def made(problem, output, monkeypatch, *, paged: bool):
    """The codes and all else that is stored, by file; and the logits of the sample."""
    monkeypatch.setattr(Source, "has_pages", property(lambda self: paged))
    run = RunDirectory(output)
    with run.open("key"):
        done = execute(problem, CALIBRATION, run, Monitor(), "cpu")
        assert done.whole != paged
        save_checkpoint(run.fresh_checkpoint(), done.model, problem, run.block_files())
        files = {file.name: file.read_bytes() for file in run.checkpoint.iterdir()}
    return files, done.logits


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_a_model_in_memory(kind, name, tmp_path, tiny_tokenizer, monkeypatch):
    if kind == "gemma" and name.startswith(("gbs", "quarot")):
        pytest.skip("folds, which this family forbids")
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, dtype=torch.bfloat16, intermediate_size=WIDTH, **KINDS[kind])
    problem = problem_of(folder, name, "fit_groups=true")
    paged, logits = made(problem, tmp_path / "paged", monkeypatch, paged=True)
    whole, expected = made(problem, tmp_path / "whole", monkeypatch, paged=False)
    assert paged == whole
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2", "deepseek_v3", "bamba"])
def test_experts_and_types_without_a_row(kind, tmp_path, monkeypatch):
    save_type(kind, tmp_path / "model")
    settings = ("center_keys=false", "balance_keys=false", "embedding=null", "head=null")
    problem = problem_of(tmp_path / "model", "w4a16", *settings)
    paged, logits = made(problem, tmp_path / "paged", monkeypatch, paged=True)
    whole, expected = made(problem, tmp_path / "whole", monkeypatch, paged=False)
    assert paged == whole
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["higgs-4", "w4a8kv8", "gbs-w3a3kv3"])
def test_scores_are_those_of_a_model_in_memory(name, tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    problem = problem_of(folder, name, "fit_groups=true")
    test = blocks_from_ids(IDS, "test", "some")
    model, turns = page_original(problem.source)
    expected = Reference.of(problem.source.load(), test, batch=2)
    reference = Reference.of(model, test, batch=2, turns=turns)
    assert torch.equal(reference.nll, expected.nll)
    assert torch.equal(reference.hidden, expected.hidden)
    recipe = apply_settings(
        preset(name), ["test=null", "search.method=none", "hadamard=16", "fit_groups=true", *text_of(tmp_path)]
    )
    quantize(folder, recipe, output=tmp_path / "out")
    stored = load_stored(tmp_path / "out", problem, "cpu", paged=True)
    found = evaluate(stored.model, test, reference, batch=2, chunk=7, turns=stored.turns)
    whole = load_stored(tmp_path / "out", problem, "cpu")
    assert found == evaluate(whole.model, test, reference, batch=2, chunk=7)


def test_scores_of_a_type_without_a_row(tmp_path):
    """Its outputs are seen by hooks, which the batches of a paged model pass in turn."""
    save_type("gpt2", tmp_path / "model")
    source, test = open_source(tmp_path / "model"), blocks_from_ids(IDS, "test", "some")
    model, turns = page_original(source)
    reference = Reference.of(model, test, batch=2, turns=turns)
    expected = Reference.of(source.load(), test, batch=2)
    assert torch.equal(reference.nll, expected.nll)
    assert torch.equal(reference.hidden, expected.hidden)
    model, turns = page_original(source)
    found = evaluate(model, test, reference, batch=2, turns=turns)
    assert found == evaluate(source.load(), test, reference, batch=2)


def text_of(tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices("abc defg\n", k=20000)))
    return [f"calibration.source={tmp_path / 'text.txt'}", "calibration.sequences=4", "calibration.seq_len=16"]


def unscored(tmp_path, name: str = "w4a16", *settings: str):
    settings = ("test=null", "search.method=none", "hadamard=16", "fit_groups=true", *settings)
    return apply_settings(preset(name), [*settings, *text_of(tmp_path)])


def forbidden(*_: object, **__: object):
    raise AssertionError("not to be called")


@pytest.mark.parametrize("paged", [False, True])
def test_without_a_score_it_is_read_back_as_it_was_made(paged, tmp_path, tiny_tokenizer, monkeypatch):
    """Whole where it was whole, as it is on a GPU; and nothing is made ready for a score."""
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    monkeypatch.setattr(Source, "has_pages", property(lambda self: paged))
    monkeypatch.setattr(running, "prepare_", forbidden)
    monkeypatch.setattr(running, "load_stored", forbidden)
    monkeypatch.setattr(*((hf, "load") if paged else (saving, "page_quantized")), forbidden)
    quantize(folder, unscored(tmp_path), output=tmp_path / "out")


def test_damage_is_found_block_by_block_too(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    out = quantize(folder, unscored(tmp_path), output=tmp_path / "out").output
    problem = problem_of(folder, "w4a16", "fit_groups=true")
    load_stored(out, problem, "cpu", paged=True)

    def damaged(tensors):
        scales = next(name for name in tensors if name.endswith(".scales") and ".layers.1." in name)
        tensors[scales].view(-1)[0] = torch.nan
        return tensors

    change_tensors(out, damaged)
    with pytest.raises(PaleyError, match="not as written: the file is damaged"):
        load_stored(out, problem, "cpu", paged=True)
    monkeypatch.setattr(hf, "check_digests", lambda folder: None)  # damaged before it was written
    with pytest.raises(PaleyError, match="scales"):
        load_stored(out, problem, "cpu", paged=True)


def test_each_block_is_read_once_for_all_jobs_and_dropped(tmp_path, tiny_tokenizer):
    source = open_source(save_tiny(tmp_path / "model", tiny_tokenizer))
    model = source.load(blocks=False)
    adapter, read = Adapter(model), []

    def reading(name, like):
        read.append(name)
        return source.checkpoint.tensor(name)

    pages = Pages(adapter, reading)
    expected = source.load()(IDS[:1], use_cache=False).logits
    with torch.no_grad():
        found = pages.in_turn([lambda at=at: model(IDS[at : at + 1], use_cache=False).logits for at in range(3)])
    assert torch.equal(found[0], expected)
    assert len(read) == len(set(read)) == sum(".layers." in name for name in source.checkpoint.names)
    assert all(p.is_meta for block in adapter.blocks for p in block.module.parameters())


def test_a_job_that_fails_ends_the_others(tmp_path, tiny_tokenizer):
    source = open_source(save_tiny(tmp_path / "model", tiny_tokenizer))
    model, turns = page_original(source)

    def fails():
        model(IDS[:1], use_cache=False)
        raise PaleyError("no")

    with pytest.raises(PaleyError, match="no"):
        turns([lambda: model(IDS[:1], use_cache=False).logits, fails, lambda: model(IDS[:1], use_cache=False)])


def test_a_run_is_paged_where_memory_does_not_hold_the_model(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=6)
    recipe = apply_settings(
        preset("w4a16"), ["hadamard=16", "fit_groups=true", "test.sequences=3", "test.seq_len=16", *text_of(tmp_path)]
    )
    with monkeypatch.context() as earlier:
        earlier.setattr(Source, "has_pages", property(lambda self: False))
        whole = quantize(folder, recipe, output=tmp_path / "whole")
    needed = {}
    for paged in (False, True):
        problem = resolve(open_source(folder), recipe)
        needed[paged] = peak.memory(problem, recipe, paged=paged)
    assert needed[True] < needed[False]
    monkeypatch.setattr(Source, "load", _never_whole(Source.load))
    paged = quantize(folder, recipe, output=tmp_path / "paged")
    assert paged.results == whole.results
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "paged" / file.name).read_bytes(), file.name
    monkeypatch.setattr(estimating, "free_memory", lambda: 2**20)
    with pytest.raises(PaleyError, match="memory: this run needs about"):
        quantize(folder, recipe, output=tmp_path / "none")


def test_a_run_is_paged_where_that_takes_less(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=6)
    short = apply_settings(unscored(tmp_path, "w4a8kv8"), ["test={sequences: 2, seq_len: 8}"])
    long = apply_settings(short, ["test.sequences=100000"])  # whose caches and states wait at each block
    for recipe, pays in ((short, True), (long, False)):
        problem = resolve(open_source(folder), recipe)
        whole, paged = (peak.memory(problem, recipe, paged=paged) for paged in (False, True))
        assert (paged < whole) == pays
        found = estimating.estimate_run(problem, recipe)
        assert (found.paged, found.memory) == (pays, min(whole, paged))


def _never_whole(load):
    def checked(self, *args, blocks=True, **kwargs):
        assert not blocks
        return load(self, *args, blocks=blocks, **kwargs)

    return checked


def test_states_are_whole_or_absent(tmp_path):
    states = States(tmp_path / "states")
    like = {"hidden": torch.zeros(2, 3), "sample": torch.zeros(1, 4)}
    assert states.last(like) is None
    states.place("hidden", torch.zeros(2, 3)).fill_(1)
    assert states.last(like) is None  # a run that is killed here has none
    states = States(tmp_path / "states")
    states.place("hidden", torch.zeros(2, 3)).fill_(2)
    states.commit(0, {"sample": torch.full((1, 4), 3.0)})
    hidden = states.place("hidden", torch.zeros(2, 3)).fill_(4)
    (tmp_path / "states/notes").mkdir()  # somebody's
    (tmp_path / "states/0007").touch()
    index, found = States(tmp_path / "states").last(like)
    assert index == 0
    assert torch.equal(found["hidden"], torch.full((2, 3), 2.0))
    assert torch.equal(found["sample"], torch.full((1, 4), 3.0))
    states.commit(1, {})
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["0001", "0007", "notes"]
    assert torch.equal(hidden, torch.full((2, 3), 4.0))
    with pytest.raises(PaleyError, match=r"0001: sample\.npy missing, or not of this run"):
        states.last(like)
    del like["sample"]
    for other in (torch.zeros(3, 3), torch.zeros(2, 3).double()):
        with pytest.raises(PaleyError, match=r"hidden\.npy: has float32 \[2, 3\], must have"):
            states.last({"hidden": other})
    (tmp_path / "states/0001/hidden.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(PaleyError, match="is damaged"):
        states.last(like)


def test_released_states_leave_memory_and_keep_their_values(tmp_path):
    states = States(tmp_path / "states")
    values = torch.arange(2**22, dtype=torch.float32).view(4, -1)
    hidden = states.place("hidden", values).copy_(values)
    assert resident("hidden.npy") > 0.9 * values.nbytes
    states.release()
    assert resident("hidden.npy") < 0.1 * values.nbytes
    assert torch.equal(hidden, values)
    hidden += 1
    states.release()
    states.commit(0, {})
    found = States(tmp_path / "states").last({"hidden": values})[1]["hidden"]
    assert torch.equal(found, values + 1)


def resident(file: str) -> int:
    """Bytes of a mapped file that are in memory."""
    if not (maps := Path("/proc/self/smaps")).exists():
        pytest.skip("needs Linux")
    found = re.findall(rf"/{re.escape(file)}\n(?:.*\n)*?Rss: +(\d+) kB", maps.read_text())
    return 1024 * sum(map(int, found))


def test_states_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    states, done = States(tmp_path / "states"), []
    for name in ("sync_folder", "publish"):
        real = getattr(stating, name)
        monkeypatch.setattr(stating, name, lambda what, real=real, name=name: (done.append(name), real(what)))
    states.commit(0, {"sample": torch.zeros(2)})
    assert done == ["sync_folder", "publish"]


@pytest.mark.parametrize("name", ["posix_fallocate", "fsync", "replace"])
def test_a_full_disk_keeps_nothing_of_what_filled_it(name, tmp_path, monkeypatch):
    states = States(tmp_path / "states")
    states.commit(0, {"sample": torch.zeros(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stating.os, name, full)
    with pytest.raises(PaleyError, match="the disk is full"):
        states.commit(1, {"sample": torch.ones(2)})
    assert [folder.name for folder in (tmp_path / "states").iterdir()] == ["0000"]
    monkeypatch.undo()
    states.commit(1, {"sample": torch.ones(2)})
    assert states.last({"sample": torch.ones(2)})[0] == 1


def test_a_run_that_an_earlier_layout_began_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    with monkeypatch.context() as earlier:
        earlier.setattr(running, "LAYOUT", 1)
        earlier.setattr(Pages, "bring_", stopped_at(1, Pages.bring_))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, unscored(tmp_path), output=tmp_path / "out")
    with pytest.raises(PaleyError, match="another version of Paley"):
        quantize(folder, unscored(tmp_path), output=tmp_path / "out", resume=True)


def stopped_at(index: int, does):
    def stopped(self, at, *args):
        if at == index:
            raise KeyboardInterrupt
        return does(self, at, *args)

    return stopped


def test_a_lost_file_is_made_again(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=4)
    quantize(folder, unscored(tmp_path), output=tmp_path / "alone")
    with monkeypatch.context() as killed:
        killed.setattr(Pages, "bring_", stopped_at(3, Pages.bring_))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, unscored(tmp_path), output=tmp_path / "out")
    (tmp_path / "out.run/final/block-0001.safetensors").unlink()
    quantize(folder, unscored(tmp_path), output=tmp_path / "out", resume=True)
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_killed_where_nothing_more_is_read(tmp_path, tiny_tokenizer, monkeypatch):
    """Behind the last weight that is not kept, states lack the text that weights are calibrated on."""
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=4)
    old = quantize(folder, unscored(tmp_path), output=tmp_path / "old").output
    other = 'overrides=[{pattern: "*.1.mlp.down_proj", weight: {grid: int8, method: gptq}}]'
    new = unscored(tmp_path, "w4a16", other)
    quantize(folder, new, base=old, output=tmp_path / "alone")
    with monkeypatch.context() as killed:
        killed.setattr(Pages, "bring_", stopped_at(3, Pages.bring_))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, new, base=old, output=tmp_path / "out")
    assert not (tmp_path / "out.run/states/0002/hidden.npy").exists()
    quantize(folder, new, base=old, output=tmp_path / "out", resume=True)
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_states_behind_a_stop_are_not_those_of_the_embedding(tmp_path, tiny_tokenizer, monkeypatch):
    """A run that reads no more of the text commits none of it, wherever it went on."""
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=6)
    old = quantize(folder, unscored(tmp_path), output=tmp_path / "old").output
    other = 'overrides=[{pattern: "*.1.mlp.down_proj", weight: {grid: int8, method: gptq}}]'
    for at in (0, 3, 4):
        with monkeypatch.context() as killed:
            killed.setattr(Pages, "bring_", stopped_at(at, Pages.bring_))
            with pytest.raises(KeyboardInterrupt):
                quantize(folder, unscored(tmp_path, "w4a16", other), base=old, output=tmp_path / "out", resume=at > 0)
        states = tmp_path / f"out.run/states/{at:04d}"
        assert (states / "hidden.npy").exists() == (states / "original.npy").exists() == (at == 0)
    quantize(folder, unscored(tmp_path, "w4a16", other), base=old, output=tmp_path / "out", resume=True)
    quantize(folder, unscored(tmp_path, "w4a16", other), base=old, output=tmp_path / "alone")
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_what_no_text_reaches_is_told_behind_a_stop(tmp_path, tiny_tokenizer, monkeypatch):
    """Also of a block that was written, the states behind which were not."""
    folder = save_with_idle_experts(tmp_path / "model", tiny_tokenizer)
    recipe = unscored(tmp_path, "w4a16", "embedding=null", "head=null", "center_keys=false")
    alone, after = Notes(), Notes()
    quantize(folder, recipe, output=tmp_path / "alone", monitor=alone)
    with monkeypatch.context() as killed:
        killed.setattr(States, "commit", stopped_at(2, States.commit))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, recipe, output=tmp_path / "out")
    quantize(folder, recipe, output=tmp_path / "out", resume=True, monitor=after)
    expected = [note for note in alone.notes if "reached no" in note]
    assert len(expected) == 4
    assert [note for note in after.notes if "reached no" in note] == expected


def test_killed_between_blocks_it_goes_on_behind_the_last_one(tmp_path, tiny_tokenizer, monkeypatch):
    """The blocks that are done are not even read again."""
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=4)
    recipe = apply_settings(preset("w4a8kv8"), ["test=null", "hadamard=16", "fit_groups=true", *text_of(tmp_path)])
    recipe = apply_settings(recipe, ["search.method=none"])
    quantize(folder, recipe, output=tmp_path / "alone")
    bring, brought = Pages.bring_, []

    def stopped(self, index):
        if index == 2:
            raise KeyboardInterrupt
        bring(self, index)

    monkeypatch.setattr(Pages, "bring_", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, recipe, output=tmp_path / "out")

    def watched(self, index):
        brought.append(index)
        bring(self, index)

    monkeypatch.setattr(Pages, "bring_", watched)
    quantize(folder, recipe, output=tmp_path / "out", resume=True)
    assert brought == [2, 3, 0, 1, 2, 3]  # to be quantized, and to be read back
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_model_without_pages_is_estimated_whole(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=64)
    problem = problem_of(folder, "w4a16", "fit_groups=true", "calibration.sequences=1", "calibration.seq_len=8")
    recipe = unscored(tmp_path)
    paged = peak.memory(problem, recipe)
    monkeypatch.setattr(Source, "has_pages", property(lambda self: False))
    whole = sum(4 * site.numel for site in problem.sites.weights)
    assert paged < peak.memory(problem, recipe)
    assert peak.memory(problem, recipe) > peak.COSTS.base + 1.5 * whole


def test_the_estimate_counts_caches_and_each_reading(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, max_position_embeddings=1024)
    stage, seconds, memory = "evaluating through the quantized cache", {}, {}
    for name in ("w4a16", "w4a8kv8"):
        recipe = apply_settings(
            preset(name), ["search.method=none", "hadamard=16", "fit_groups=true", "test.sequences=2"]
        )
        for seq_len in (128, 513):
            longer = apply_settings(recipe, [f"test.seq_len={seq_len}"])
            problem = resolve(open_source(folder), longer)
            for pages in (False, True):
                seconds[name, seq_len, pages] = dict(estimating._Work(problem, longer, pages).stages(False, False))[
                    stage
                ]
            memory[name, seq_len] = peak.cached(problem, longer.test)

    def reading(name, seq_len):
        return seconds[name, seq_len, True] - seconds[name, seq_len, False]

    assert reading("w4a16", 513) == pytest.approx(reading("w4a16", 128))
    assert reading("w4a8kv8", 513) == pytest.approx(4 * reading("w4a8kv8", 128))
    assert memory["w4a16", 513] == 0
    assert memory["w4a8kv8", 513] == pytest.approx(513 / 128 * memory["w4a8kv8", 128], abs=2)


def test_what_is_outside_of_blocks_alone_is_cast(tmp_path, tiny_tokenizer):
    problem = problem_of(save_tiny(tmp_path / "model", tiny_tokenizer), "w4a16", "fit_groups=true")
    model = problem.source.load()
    everything = stored_tensors(model, "", problem)
    outside = stored_tensors(model, "", problem, without="model.layers.")
    assert outside.keys() == {name for name in everything if not name.startswith("model.layers.")}
