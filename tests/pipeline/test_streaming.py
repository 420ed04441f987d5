"""Quantizing tensor by tensor: the same model as in memory, however it is cut up, stopped or shared out."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paley import hf
from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.plain_grids import to_plain
from paley.core.schemes import LinearScheme
from paley.format.checkpoint import Checkpoint, read_tensors
from paley.format.files import write_json
from paley.format.header import TensorInfo
from paley.model.loading import Source, open_source
from paley.pipeline import Monitor, make_plan, quantize, streaming
from paley.pipeline.execute import execute
from paley.pipeline.resolve import under_plan
from paley.plan import Plan
from paley.recipe import apply_settings, preset
from tiny_models import EMBEDDING, HEAD, higgs, save_tiny, store_tie_as

# A process takes seconds to begin.
OF_ONE_MODEL = pytest.mark.parametrize("folder", ["qwen2 tied"], indirect=True)


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def folder(request, tmp_path_factory, tiny_tokenizer):
    qwen = request.param.startswith("qwen2")
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_tokenizer, qwen=qwen)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("weights.grid=p3n64", "seed=5"),
        ("weights.grid=int4", "weights.scale_search=mse", "weights.group_size=8"),
        ("weights.grid=uint3", "weights.scale_search=absmax", "rotate=none"),
        ('overrides=[{pattern: "*.1.mlp.*", keep: true}]',),
        ("weights.grid=e8q4k4",),
    ],
)
@torch.no_grad()
def test_it_is_the_model_that_is_made_in_memory(folder, settings, tmp_path):
    wanted, source = higgs(*settings), open_source(folder)
    plan = make_plan(folder, wanted)
    made = execute(under_plan(source, plan), None, None, Monitor(), "cpu")
    expected, reports = made.model, made.reports
    outcome = quantize(folder, wanted, output=tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(hf.load(outcome.output, product="packed")(ids).logits, expected(ids).logits)
    assert outcome.plan.linears == plan.linears
    errors = {name: layer.rel_error for name, layer in outcome.results.layers.items()}
    assert errors == pytest.approx({report.name: report.rel_error for report in reports}, rel=1e-5)


def test_biases_and_ties_are_kept_and_every_byte_counts(folder, tmp_path):
    source, outcome = open_source(folder), quantize(folder, higgs(), output=tmp_path / "out")
    stored = Checkpoint.open(outcome.output)
    for name in source.checkpoint.names:
        if name.endswith("bias"):
            assert torch.equal(stored[name], source.checkpoint[name].half())
    assert ("lm_head.codes" in stored) == (source.config.tie_word_embeddings is False)
    assert "model.embed_tokens.codes" in stored
    assert outcome.results.bytes == stored.nbytes
    assert outcome.results.evaluation is None
    assert "Nobody has measured this model" in (outcome.output / "README.md").read_text()
    # An MLP of 37 is padded to 48 = 3 * 16; its codes are read as they are, the zeros cost what they cost.
    assert outcome.plan.linears["model.layers.0.mlp.down_proj"].transform.out_dim == 48


def test_gaussian_layers_have_the_error_of_the_grid(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, hidden_size=256, intermediate_size=512)
    wanted = higgs("hadamard=1024", "weights.scale_search=rms", name="higgs-3e16h16")
    results = quantize(folder, wanted, output=tmp_path / "out").results
    expected = grids.load("p2n64").mse
    assert [layer.rel_error for layer in results.layers.values()] == pytest.approx([expected] * 14, rel=0.03)


@OF_ONE_MODEL
def test_processes_share_the_work_without_changing_it(folder, tmp_path):
    alone = quantize(folder, higgs(), output=tmp_path / "one")
    shared = quantize(folder, higgs(), output=tmp_path / "two", workers=2)
    assert contents(alone.output) == contents(shared.output)


@pytest.mark.long
@OF_ONE_MODEL
def test_workers_are_other_processes(folder, tmp_path, monkeypatch):
    """What is patched here a spawned process does not see: units that fail here are made elsewhere, or not at all."""

    class Counting(Monitor):
        most = 0

        def step(self, detail: str = "") -> None:
            self.most = max(self.most, len(multiprocessing.active_children()))

    def fail(*args: object, **more: object) -> None:
        raise AssertionError("rounded in the parent")

    monkeypatch.setattr(streaming, "turned_parts", fail)
    with pytest.raises(AssertionError, match="rounded in the parent"):
        quantize(folder, higgs(), output=tmp_path / "one")
    counting = Counting()
    quantize(folder, higgs(), output=tmp_path / "two", workers=2, monitor=counting)
    assert counting.most == 2


def test_a_model_is_never_in_memory(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, num_hidden_layers=24, vocab_size=260)
    infos = Checkpoint.open(folder).infos.values()
    largest, total = max(info.nbytes for info in infos), sum(info.nbytes for info in infos)
    seen, read = [], TensorInfo.read

    def watched(info: TensorInfo) -> torch.Tensor:
        tensor = read(info)
        seen.append(in_memory())
        return tensor

    def fail(*args: object, **more: object) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr(Source, "load", fail)
    monkeypatch.setattr(TensorInfo, "read", watched)
    monkeypatch.setattr(streaming, "_SHARD", 2 * largest)
    gc.collect()
    gc.freeze()  # what is there already is passed over
    try:
        outcome = quantize(folder, higgs(), output=tmp_path / "out")
    finally:
        gc.unfreeze()
    assert len(list(outcome.output.glob("*.safetensors"))) > 1
    assert len(seen) > 2 * len(infos)  # checked, fingerprinted, rounded, read back
    assert max(seen) < 6 * largest < total / 3


def in_memory() -> int:
    """Bytes of all tensors on the CPU that Python knows."""
    found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.long
def test_a_unit_carries_the_grid_it_needs(tmp_path, tiny_tokenizer, monkeypatch):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    grid = grids.custom(torch.randn(9, 2, generator=torch.Generator().manual_seed(5)))
    outcome = quantize(folder, higgs(f"weights.grid={json.dumps(to_plain(grid))}"), output=tmp_path / "out")
    name, scheme = next(iter(outcome.plan.linears.items()))
    info = Checkpoint.open(folder).info(f"{name}.weight")
    job = pickle.dumps(streaming.TensorJob(name, info.shape[0], info, scheme, tmp_path / "unit.safetensors"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        report = pool.submit(_unpickled, job).result()
    assert report.rel_error == outcome.results.layers[name].rel_error
    stored = Checkpoint.open(outcome.output)
    for tensor, value in read_tensors(tmp_path / "unit.safetensors").items():
        assert torch.equal(value, stored[tensor])


def _unpickled(job: bytes):
    torch.set_num_threads(1)
    return streaming.quantize_tensor(pickle.loads(job))


def test_a_stopped_run_makes_no_weight_twice(folder, tmp_path, monkeypatch):
    whole = contents(quantize(folder, higgs(), output=tmp_path / "whole").output)

    class Stopping(Monitor):
        steps = 0

        def step(self, detail: str = "") -> None:
            self.steps += "rel_error" in detail
            if self.steps == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, higgs(), output=tmp_path / "out", monitor=Stopping())
    made = sorted((tmp_path / "out.run" / "final").iterdir())
    assert len(made) == 5
    times = [file.stat().st_mtime_ns for file in made]
    resumed = quantize(folder, higgs(), output=tmp_path / "out", resume=True, monitor=Watching(made, times))
    assert contents(resumed.output) == whole


class Watching(Monitor):
    """Sees that files written before the kill are still the same ones while the run is at work."""

    def __init__(self, files: list[Path], times: list[int]):
        self.files, self.times = files, times

    def step(self, detail: str = "") -> None:
        if self.files[0].exists():
            assert [file.stat().st_mtime_ns for file in self.files] == self.times


def _run(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    quantize(folder, higgs(), output=output, resume=output.with_name(output.name + ".run").exists())


@OF_ONE_MODEL
def test_killed_it_ends_in_the_same_bytes(folder, tmp_path):
    torch.set_num_threads(1)
    whole = contents(quantize(folder, higgs(), output=tmp_path / "whole").output)
    context, output, kills = multiprocessing.get_context("fork"), tmp_path / "out", 0
    while not output.exists():
        child = context.Process(target=_run, args=(folder, output))
        child.start()
        child.join(0.05 + 0.07 * kills)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if child.exitcode not in (0, -signal.SIGKILL):
            pytest.fail(f"a resumed run failed with {child.exitcode}")
        time.sleep(0)
    assert kills
    assert contents(output) == whole


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": 64}, "config.json and the weights disagree: .* has shape"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights have 2 layers"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, tiny_tokenizer, change, complaint):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | change)
    with pytest.raises(PaleyError, match=complaint):
        quantize(folder, higgs(), output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@torch.no_grad()
def test_a_kept_weight_is_turned_where_its_input_is(folder, tmp_path):
    wanted = apply_settings(preset("higgs-w3a8"), ["test=null", "hadamard=16"])
    source = open_source(folder)
    plan = make_plan(folder, wanted)
    name = "model.layers.0.mlp.down_proj"  # padded from 37 to 48
    plan = plan.model_copy(update={"linears": plan.linears | {name: replace(plan.linears[name], weight=None)}})
    expected = execute(under_plan(source, plan), None, None, Monitor(), "cpu").model
    outcome = quantize(folder, plan=plan, output=tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(hf.load(outcome.output, product="packed")(ids).logits, expected(ids).logits)


@pytest.mark.long
@OF_ONE_MODEL
def test_processes_know_a_grid_of_ones_own(folder, tmp_path):
    grid = grids.custom(torch.randn(9, 2, generator=torch.Generator().manual_seed(3)))
    wanted = higgs(f"weights.grid={json.dumps(to_plain(grid))}")
    alone = quantize(folder, wanted, output=tmp_path / "one")
    shared = quantize(folder, wanted, output=tmp_path / "two", workers=2)
    assert contents(alone.output) == contents(shared.output)
    assert {s.weight.grid for path, s in alone.plan.linears.items() if ".layers." in path} == {grid}


def test_a_grid_that_only_the_recipe_names_is_carried_too(folder, tmp_path):
    grid = grids.custom(torch.randn(9, 2, generator=torch.Generator().manual_seed(4)))
    keep = "overrides=[{pattern: '*', keep: true}]"
    plan = quantize(folder, higgs(f"weights.grid={json.dumps(to_plain(grid))}", keep), output=tmp_path / "out").plan
    assert plan.recipe.weights.grid == grid
    assert Plan.load(tmp_path / "out/plan.json") == plan


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda linears: linears.pop("model.layers.0.mlp.down_proj"), "model.layers.0.mlp.down_proj has no scheme"),
        (lambda linears: linears.update({"../x": LinearScheme()}), r"'?\.\./x'? is no layer of this model"),
    ],
)
def test_an_edited_plan_must_fit(folder, tmp_path, change, complaint):
    plan = make_plan(folder, higgs())
    linears = dict(plan.linears)
    change(linears)
    with pytest.raises(PaleyError, match=complaint):
        quantize(folder, plan=plan.model_copy(update={"linears": linears}), output=tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


def test_tables_that_old_checkpoints_hold_are_passed_over(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: torch.ones(6)}, folder / "old.safetensors")
    index["weight_map"][name] = "old.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    outcome = quantize(folder, higgs(), output=tmp_path / "out")
    assert name not in Checkpoint.open(outcome.output)
    hf.load(outcome.output)


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"tie_word_embeddings": True})
    with pytest.raises(PaleyError, match=r"lm_head.weight is not model.embed_tokens.weight; set it to false"):
        quantize(folder, higgs(), output=tmp_path / "out")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}


@pytest.mark.parametrize("names", [(HEAD,), (HEAD, EMBEDDING)])
@torch.no_grad()
def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path, tiny_tokenizer, names):
    usual, other = save_tiny(tmp_path / "usual", tiny_tokenizer, qwen=True), tmp_path / "other"
    folder = store_tie_as(save_tiny(other, tiny_tokenizer, qwen=True), *names)
    coded = [quantize(model, higgs(), output=tmp_path / f"coded {model.name}").output for model in (usual, folder)]
    assert weights(coded[0]) == weights(coded[1])
    kept = higgs(name="higgs-3e16h16")
    usual, other = (quantize(model, kept, output=tmp_path / f"kept {model.name}") for model in (usual, folder))
    assert weights(other.output) == weights(usual.output)
    for key in ("parameters", "bits_per_weight", "bits_per_quantized_weight", "original_bytes", "untouched"):
        assert getattr(other.results, key) == getattr(usual.results, key)
    model = hf.load(other.output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, Checkpoint.open(folder)[HEAD].half().float())
