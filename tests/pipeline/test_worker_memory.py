"""What workers hold: a block of the model at a time where they can; too many of them are refused before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_sources import Notes

import paley
from every_type import save_type
from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence
from paley.data import blocks_from_ids
from paley.model import capture
from paley.model.adapter import Adapter
from paley.model.loading import Source, open_source
from paley.model.replay import runner_of
from paley.model.sensitivity import KINDS
from paley.model.trials import Objective
from paley.pipeline import pool as pools
from paley.pipeline import sensitivities
from paley.pipeline.cluster import Ray
from paley.pipeline.pool import Processes, check_fit
from paley.pipeline.probing import Probing
from paley.pipeline.worker_memory import of_gradients, of_scores, of_tensors, of_trials
from tiny_models import higgs, save_tiny

GIB = 2**30
MEASURED = {"source": "random", "sequences": 3, "seq_len": 24, "levels": 4, "method": "noise"}


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_noise_in_a_block_at_a_time_is_that_in_the_whole_model(kind, metric, tmp_path, tiny_tokenizer):
    folder = tmp_path / "model"
    if kind in ("llama", "gemma"):
        save_tiny(folder, tiny_tokenizer, gemma=kind == "gemma", dtype=torch.bfloat16)
    else:
        save_type(kind, folder)
    source = open_source(folder)
    ids = torch.randint(5, 60, (9, 12), generator=torch.Generator().manual_seed(0))
    kinds = ("weight", "input") if kind == "gpt2" else KINDS  # without a row nothing tells what makes keys
    job = Probing(str(folder), source.fingerprint, ids, metric, kinds, False, 0, "cpu", "key")
    assert job.can_page(source)
    whole, paged = (job.probe(source, paged=paged) for paged in (False, True))
    assert paged.baseline == whole.baseline
    blocks = Adapter(paged.runner.adapter.model).blocks
    for name in whole.sites:
        assert paged.delta(name, 0.2, 1) == whole.delta(name, 0.2, 1), name
        assert all(p.is_meta for block in blocks for p in block.module.parameters())  # nothing stays behind


def test_models_whose_gains_are_folded_are_held_whole(tmp_path, tiny_tokenizer):
    source = open_source(save_tiny(tmp_path / "model", tiny_tokenizer))
    assert not Probing("", "", torch.ones(1, 4).long(), "kl", ("weight",), True, 0, "cpu", "key").can_page(source)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_few_logits_exist_at_a_time(kind, tmp_path, tiny_tokenizer, monkeypatch):
    folder = tmp_path / "model"
    _ = save_tiny(folder, tiny_tokenizer) if kind == "llama" else save_type(kind, folder)
    runner = runner_of(Adapter(open_source(folder).load()))
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    last = runner.suffix(0, runner.embed(ids))
    other = last + 0.1 * torch.randn(last.shape, generator=torch.Generator().manual_seed(1))
    logits, others = (runner.logits(hidden)[:, :-1] for hidden in (last, other))
    nll = torch.nn.functional.cross_entropy(others.flatten(0, 1), ids[:, 1:].flatten())
    vocabulary = runner.adapter.sites.head.shape[0]
    seen, real = [], type(runner).logits
    monkeypatch.setattr(capture, "LOGITS", 5 * vocabulary)
    monkeypatch.setattr(type(runner), "logits", lambda *a: seen.append(real(*a)) or seen[-1])
    kl = Objective(runner, ids, last, "kl")(other)
    assert kl == pytest.approx(float(kl_divergence(logits, others).mean()), rel=1e-5)
    assert Objective(runner, ids, None, "perplexity")(other) == pytest.approx(float(nll.exp()), rel=1e-5)
    assert max(found.numel() for found in seen) == (5 if kind == "llama" else 12) * vocabulary


def test_a_model_that_memory_does_not_hold_is_measured_block_by_block(tmp_path, tiny_tokenizer, monkeypatch):
    model = save_tiny(tmp_path / "model", tiny_tokenizer)
    notes, alone = Notes(), paley.measure_sensitivity(model, **MEASURED)
    source = open_source(model)
    blocks = blocks_from_ids(torch.ones(3, 24).long(), "calibration", "some")
    whole, paged = (of_trials(source.sites, blocks, paged=p, own_head=True) for p in (False, True))
    assert paged < whole
    monkeypatch.setattr(sensitivities, "free_memory", lambda: whole - 1)
    assert paley.measure_sensitivity(model, **MEASURED, monitor=notes) == alone
    assert "memory does not hold the model: it is measured block by block" in notes.notes
    monkeypatch.setattr(sensitivities, "free_memory", lambda: paged - 1)
    with pytest.raises(PaleyError, match=r"memory: sensitivities need about .* GiB are free; use fewer or shorter"):
        paley.measure_sensitivity(model, **MEASURED)
    monkeypatch.setattr(sensitivities, "free_memory", lambda: whole - 1)
    monkeypatch.setattr(Source, "has_pages", property(lambda self: False))
    with pytest.raises(PaleyError, match="memory: sensitivities need about"):
        paley.measure_sensitivity(model, **MEASURED)


def test_gradients_need_the_model_in_memory(tmp_path, tiny_tokenizer, monkeypatch):
    model = save_tiny(tmp_path / "model", tiny_tokenizer)
    needed = of_gradients(open_source(model).sites, 24)
    monkeypatch.setattr(sensitivities, "free_memory", lambda: needed - 1)
    with pytest.raises(PaleyError, match=r"memory: gradients need about .* are free; take shorter .*method=noise"):
        paley.measure_sensitivity(model, **MEASURED | {"method": "gradients"})
    monkeypatch.setattr(sensitivities, "free_memory", lambda: needed)
    assert paley.measure_sensitivity(model, **MEASURED | {"method": "gradients"}).slots


def test_more_workers_than_memory_holds(tmp_path, tiny_tokenizer, monkeypatch):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    out = paley.quantize(model, higgs(), output=tmp_path / "out").output
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"Story {n} of {n * n} things. " * 3 for n in range(200)))
    monkeypatch.setattr(pools, "free_memory", lambda: 2 * GIB)
    refused = r"memory: 40 workers need about 0\.\d GiB each, and 2\.0 GiB are free; use workers=[234]$"
    with pytest.raises(PaleyError, match=refused):
        paley.score(out, data=str(text), sequences=9, seq_len=24, workers=40)
    with pytest.raises(PaleyError, match=refused):
        paley.measure_sensitivity(model, **MEASURED, workers=40)
    with pytest.raises(PaleyError, match=refused):
        paley.quantize(model, higgs(), output=tmp_path / "other", workers=40)
    assert not (tmp_path / "other").exists()


def test_how_many_fit():
    check_fit(4, GIB, None)
    check_fit(4, GIB, 4 * GIB)
    with pytest.raises(PaleyError, match=r"memory: 4 workers need about 1\.0 GiB each, and 3\.5 .*; use workers=3"):
        check_fit(4, GIB, 7 * GIB // 2)
    with pytest.raises(PaleyError, match="leave workers out"):
        check_fit(4, GIB, 3 * GIB // 2)
    for workers in (1, 4):
        with pytest.raises(PaleyError, match="use a machine with more memory"):
            check_fit(workers, GIB, GIB // 2)
    Processes(4).check()


@pytest.mark.parametrize(
    ("free", "way_out"), [(5 * GIB, "start Ray there with --num-cpus 5"), (1, "use nodes with more memory")]
)
def test_a_node_with_more_cores_than_its_memory_serves(free, way_out):
    cluster = Ray(SimpleNamespace(), 8)
    cluster._check_memory("10.0.0.1", 8, GIB, 8 * GIB)
    cluster._check_memory("10.0.0.1", 8, GIB, None)
    with pytest.raises(PaleyError, match=rf"memory: 8 workers of node 10\.0\.0\.1 need about 1\.0 GiB .*{way_out}"):
        cluster._check_memory("10.0.0.1", 8, GIB, free)
    with pytest.raises(PaleyError, match="use workers=5"):
        Ray(SimpleNamespace(), 8, local=True)._check_memory("here", 8, GIB, 5 * GIB)


def test_what_is_counted(tmp_path, tiny_tokenizer):
    sites = open_source(save_tiny(tmp_path / "model", tiny_tokenizer)).sites
    blocks = blocks_from_ids(torch.ones(3, 24).long(), "test", "some")
    more = blocks_from_ids(torch.ones(8, 24).long(), "test", "some")
    head = 4 * sites.head.numel
    plain, own = (of_trials(sites, blocks, paged=True, own_head=own) for own in (False, True))
    assert own - plain == head
    assert of_trials(sites, more, paged=True, own_head=True) > own
    whole = 4 * sum(site.numel for site in sites.weights)
    assert of_trials(sites, blocks, paged=False, own_head=False) - plain < whole
    assert of_scores(sites, blocks, compared=True) - of_scores(sites, blocks, compared=False) == head
    assert of_tensors(sites, 8) < of_tensors(sites, 1)  # the largest tensor is one worker's
    assert of_tensors(sites, 1) < of_scores(sites, blocks, compared=False)
