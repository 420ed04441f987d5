"""Undoing the format: what stock transformers computes from the plain folder is what the quantized model computes."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import paley
from paley.cli import app
from paley.core.errors import PaleyError
from paley.export.plain import dequantize
from paley.format.checkpoint import Checkpoint
from paley.format.writer import ShardWriter
from paley.model.linear import QuantLinear
from paley.pipeline import quantize
from paley.recipe import apply_settings, preset
from tiny_models import EMBEDDING, HEAD, higgs, save_tiny, store_tie_as, unseal

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def model(request, tmp_path_factory, tiny_tokenizer):
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_tokenizer, qwen=request.param.startswith("qwen2"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    words = [f"{n} {'abcdefg'[n % 7] * (n % 5 + 1)} story number {n * n}." for n in range(600)]
    file.write_text("\n<|endoftext|>\n".join(" ".join(words[i : i + 9]) for i in range(0, 600, 9)))
    return file


def with_text(name: str, text: Path, *settings: str):
    sizes = [f"{part}.{what}" for part in ("calibration", "search", "test") for what in ("sequences=2", "seq_len=32")]
    return apply_settings(preset(name), [f"calibration.source={text}", "search.iterations=1", *sizes, *settings])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def plain_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


def assert_undone(made: Path, plain: Path, tolerance: float = 1e-5) -> None:
    want = logits(paley.load(made, product="dense"))
    assert (plain_logits(plain) - want).norm() <= tolerance * want.norm()
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("weights.grid=p3n64", "seed=5"),
        ("weights.grid=e8q9k6",),
        ("weights.grid=uint3", "weights.scale_search=absmax", "weights.group_size=8"),
        ('overrides=[{pattern: "*.1.mlp.*", keep: true}]',),
    ],
)
def test_data_free_models_predict_the_same(model, settings, tmp_path):
    out = quantize(model, higgs("dtype=float32", *settings), output=tmp_path / "out").output
    made = dequantize(out, output=tmp_path / "plain")
    assert_undone(out, tmp_path / "plain")
    assert (made.output, made.dropped) == (tmp_path / "plain", ())
    assert made.bytes == Checkpoint.open(tmp_path / "plain").nbytes > made.quantized_bytes


@pytest.mark.parametrize("settings", [(), ("expand=auto",), ('overrides=[{pattern: "*.down_proj", weight: null}]',)])
def test_rotated_models_predict_the_same(tmp_path, tiny_tokenizer, text, settings):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, intermediate_size=40)
    recipe = with_text("w4a16", text, "dtype=float32", *settings)
    outcome = quantize(model, recipe, output=tmp_path / "out")
    linears = outcome.plan.linears
    down = linears["model.layers.0.mlp.down_proj"]
    assert (down.transform is None) == (down.weight is None)
    assert linears["model.layers.0.self_attn.o_proj"].transform is not None
    dequantize(outcome.output, output=tmp_path / "plain")
    assert_undone(outcome.output, tmp_path / "plain")


def test_everything_else_is_kept(model, tmp_path):
    out = quantize(model, higgs(), output=tmp_path / "out").output
    dequantize(out, output=tmp_path / "plain")
    quantized, plain = Checkpoint.open(out), Checkpoint.open(tmp_path / "plain")
    for name in Checkpoint.open(model).names:
        assert plain.dtype(name) == torch.float16
        if name in quantized:
            assert torch.equal(plain[name], quantized[name])
    assert plain.names == [n for n in Checkpoint.open(model).names if n in plain]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (out / name).read_bytes()
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "`out`" in card
    assert "p2n64 × 14" in card
    assert "p1n64 × " in card
    assert_undone(out, tmp_path / "plain", 5e-3)  # a weight in float16
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_another_type_may_be_asked_for(model, tmp_path):
    out = quantize(model, higgs(), output=tmp_path / "out").output
    dequantize(out, output=tmp_path / "plain", dtype="float32")
    assert {i.dtype for i in Checkpoint.open(tmp_path / "plain").infos.values()} == {torch.float32}
    assert_undone(out, tmp_path / "plain")


def test_a_process_without_paley_loads_it(model, tmp_path):
    out = quantize(model, higgs("dtype=float32"), output=tmp_path / "out").output
    dequantize(out, output=tmp_path / "plain")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; torch.set_num_threads(1)\n"
        "m, info = A.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)\n"
        "assert not any(info.values()) and 'paley' not in sys.modules, info\n"
        "torch.save(m.eval()(torch.arange(3, 40)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "plain", tmp_path / "logits"], check=True)
    want = logits(paley.load(out, product="dense"))
    assert (torch.load(tmp_path / "logits", weights_only=True) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("names", [(HEAD,), (HEAD, EMBEDDING)])
def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path, tiny_tokenizer, names):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    out = quantize(model, higgs("dtype=float32", name="higgs-3e16h16"), output=tmp_path / "out").output
    store_tie_as(unseal(out), *names)
    dequantize(out, output=tmp_path / "plain")
    assert_undone(out, tmp_path / "plain")


@pytest.fixture
def rounding(tmp_path, tiny_tokenizer, text):
    """A model that rounds inputs, keys and values, with a mean taken off the keys."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, intermediate_size=40)
    recipe = with_text("w4a4kv4", text, "search.method=none", "center_keys=mean", "dtype=float32")
    return quantize(model, recipe, output=tmp_path / "out").output


def test_rounding_at_run_time_is_refused_or_dropped(rounding, tmp_path):
    assert any(name.endswith("key_offset") for name in Checkpoint.open(rounding))
    with pytest.raises(PaleyError, match=r"14 linear inputs to \w+; 2 layers' cached keys .*; weights_only=True"):
        dequantize(rounding, output=tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    made = dequantize(rounding, output=tmp_path / "plain", weights_only=True)
    assert [what.split(" to ")[0] for what in made.dropped] == [
        "rounding of 14 linear inputs", "rounding of 2 layers' cached keys", "rounding of 2 layers' cached values",
    ]  # fmt: skip
    assert "Dropped: rounding of 14 linear inputs" in (tmp_path / "plain" / "README.md").read_text()
    model = paley.load(rounding, product="dense")
    for module in model.modules():  # the same model, rounding nothing as it runs
        if isinstance(module, QuantLinear):
            module.set_input_(None)
        if hasattr(module, "kv_scheme"):
            module.kv_scheme = None
    want = logits(model)
    assert (plain_logits(tmp_path / "plain") - want).norm() <= 1e-5 * want.norm()


@pytest.fixture
def made(tmp_path, tiny_tokenizer):
    return quantize(save_tiny(tmp_path / "model", tiny_tokenizer), higgs(), output=tmp_path / "out").output


def test_a_value_that_does_not_fit_is_named(made, tmp_path):
    file = unseal(made) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.scales"][3] = 60000.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        PaleyError, match=r"layers\.1\.mlp\.up_proj\.weight: .* does not fit torch.float16; set dtype=float32"
    ):
        dequantize(made, output=tmp_path / "plain")
    dequantize(made, output=tmp_path / "plain", dtype="bfloat16")


def test_where_the_output_may_be(made, tmp_path, monkeypatch):
    for output, complaint in [
        (made, "holds the model"),
        (tmp_path, "holds the model"),
        (made / "plain", "lies in the model's own folder"),
        (Path("/"), "is no name for a new folder"),
        (tmp_path / ("x" * 253), "cannot be written: File name too long"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(PaleyError, match=complaint):
                dequantize(made, output=output, overwrite=overwrite)
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.chdir(mine)
    with pytest.raises(PaleyError, match="holds the current folder"):
        dequantize(made, output=mine, overwrite=True)
    monkeypatch.chdir(tmp_path)
    (mine / "novel.txt").write_text("never saved elsewhere")
    with pytest.raises(PaleyError, match="exists already"):
        dequantize(made, output=mine)
    with pytest.raises(PaleyError, match="was not made by Paley"):
        dequantize(made, output=mine, overwrite=True)
    assert (mine / "novel.txt").exists()


def test_overwrite_replaces_what_paley_made(made, tmp_path):
    plain = tmp_path / "plain"
    dequantize(made, output=plain, dtype="float32")
    with pytest.raises(PaleyError, match="exists already"):
        dequantize(made, output=plain)
    (plain / "old").touch()
    dequantize(made, output=plain, overwrite=True)
    assert not (plain / "old").exists()
    assert json.loads((plain / "config.json").read_text())["dtype"] == "float16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]


def test_a_folder_of_someone_else_in_the_place_of_its_own_is_kept(made, tmp_path):
    work = tmp_path / ".plain.tmp"
    for names in (["novel.txt"], ["lock", "novel.txt"], ["new", "replaced"]):
        work.mkdir()
        for name in names:
            (work / name).write_text("never saved elsewhere")
        with pytest.raises(PaleyError, match=r"\.plain\.tmp: is no work folder of Paley; move it away"):
            dequantize(made, output=tmp_path / "plain", overwrite=True)
        assert sorted(p.name for p in work.iterdir()) == names
        shutil.rmtree(work)
    work.touch()
    with pytest.raises(PaleyError, match=r"\.plain\.tmp: is no work folder of Paley; move it away"):
        dequantize(made, output=tmp_path / "plain")
    assert work.exists()


def test_the_model_in_the_place_of_its_own_folder_is_kept(made, tmp_path, monkeypatch):
    work = tmp_path / ".plain.tmp"
    for inside in ("", "new"):
        source = work / inside
        shutil.copytree(made, source)
        (work / "lock").touch()
        before = sorted(work.rglob("*"))
        with pytest.raises(PaleyError, match=r"plain: is made in .*\.plain\.tmp, which holds the model"):
            dequantize(source, output=tmp_path / "plain", overwrite=True)
        assert sorted(work.rglob("*")) == before
        monkeypatch.chdir(work)
        with pytest.raises(PaleyError, match=r"plain: is made in .*\.plain\.tmp, which holds the current folder"):
            dequantize(made, output=tmp_path / "plain", overwrite=True)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(work)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_meanwhile_is_kept(made, tmp_path, overwrite):
    plain = tmp_path / "plain"

    def appear(total: int, name: str) -> None:
        plain.mkdir(exist_ok=True)
        (plain / "novel.txt").write_text("never saved elsewhere")

    with pytest.raises(PaleyError, match=r"plain: appeared while this run was at work; move it away and run again$"):
        dequantize(made, output=plain, overwrite=overwrite, on_tensor=appear)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]
    assert [p.name for p in plain.iterdir()] == ["novel.txt"]


def test_a_refused_output_leaves_no_folder(made, tmp_path):
    def refuse(total: int, name: str) -> None:
        raise PaleyError("a bad tensor")

    with pytest.raises(PaleyError, match="a bad tensor"):
        dequantize(made, output=tmp_path / "x" / "y" / "z", on_tensor=refuse)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    (tmp_path / "plain").touch()
    with pytest.raises(PaleyError, match="exists already"):  # before anything is read
        dequantize(tmp_path / "no model", output=tmp_path / "plain")


@pytest.fixture
def undeletable(monkeypatch):
    """A file called 'busy' is one that the system does not delete, as NFS does with one that is open."""
    unlink = os.unlink

    def refuse(path, **options):
        if Path(path).name == "busy":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)


def test_an_older_output_that_cannot_be_deleted_is_named_and_blocks_nothing(made, tmp_path, undeletable, monkeypatch):
    plain, work = tmp_path / "plain", tmp_path / ".plain.tmp"
    dequantize(made, output=plain, dtype="float32")
    (plain / "busy").touch()
    for dtype in ("float16", "bfloat16"):
        found = dequantize(made, output=plain, dtype=dtype, overwrite=True)
        assert json.loads((plain / "config.json").read_text())["dtype"] == dtype
        (left,) = found.leftover
        assert left.parent == work
        assert [p.name for p in left.rglob("*")] == ["busy"]
    code, _, err = run("dequantize", made, "--output", plain, "--overwrite")
    assert code == 0
    assert err.endswith(f"warning: {left}: cannot be deleted; delete it yourself\n")
    assert json.loads(run("dequantize", made, "--output", plain, "--overwrite", "--json")[1])["leftover"] == [str(left)]
    monkeypatch.undo()
    assert dequantize(made, output=plain, overwrite=True).leftover == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("quantization_config"), "is no Paley checkpoint"),
        (lambda c: c.update(dtype="int8"), r"config\.json: dtype: must be float16, .* got 'int8'; dtype"),
        (lambda c: c.update(intermediate_size=38), "transform.in_dim=37, but the layer reads 38"),
        (lambda c: c.update(num_hidden_layers=3), "num_hidden_layers is 3, but the weights have 2 layers"),
        (lambda c: c.update(num_hidden_layers=1), "is no linear layer of this model; did you mean"),
        (lambda c: c["quantization_config"]["linears"][UP].update(weight=None), f"no tensor '{UP}.weight'"),
        (lambda c: c["quantization_config"]["linears"].pop(UP), f"no tensor '{UP}.weight'"),
        (lambda c: c["quantization_config"]["linears"][UP]["weight"].update(grid="p2n16"), rf"{UP}\.codes: must be"),
        (lambda c: c.update(model_type="nothing"), "does not understand"),
    ],
)
def test_folders_that_do_not_fit_together_are_refused(made, tmp_path, change, complaint):
    edit(unseal(made) / "config.json", change)
    with pytest.raises(PaleyError, match=complaint):
        dequantize(made, output=tmp_path / "plain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_damaged_folder_is_not_decoded(made, tmp_path):
    edit(made / "config.json", lambda c: c.update(rms_norm_eps=1e-3))
    with pytest.raises(PaleyError, match=r"rms_norm_eps is not as written"):
        dequantize(made, output=tmp_path / "plain")


def test_what_stops_it_leaves_nothing(made, tmp_path, monkeypatch):
    def stop(total: int, name: str) -> None:
        if name.endswith("1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize(made, output=tmp_path / "plain", on_tensor=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def _slowly(made: Path, plain: Path) -> None:
    dequantize(made, output=plain, on_tensor=lambda total, name: time.sleep(0.05))


def test_killed_it_leaves_no_output_and_the_next_run_is_whole(made, tmp_path):
    torch.set_num_threads(1)
    plain = tmp_path / "plain"
    child = multiprocessing.get_context("fork").Process(target=_slowly, args=(made, plain))
    child.start()
    while not (tmp_path / ".plain.tmp" / "new").exists():  # it is at its tensors from then on, for a second
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not plain.exists()
    dequantize(made, output=plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]
    assert plain_logits(plain).isfinite().all()


def _killed_after(renames: int, made: Path, plain: Path) -> None:
    rename, done = Path.rename, iter(range(renames))

    def killing(self: Path, target: Path) -> None:
        rename(self, target)
        if plain in (self, target) and next(done) == renames - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = killing
    dequantize(made, output=plain, overwrite=True)


@pytest.mark.parametrize(("renames", "left"), [(1, "old"), (2, "new")])
def test_killed_while_it_replaces_it_loses_nothing(made, tmp_path, renames, left):
    torch.set_num_threads(1)
    plain = tmp_path / "plain"
    dequantize(made, output=plain, dtype="float32")
    old = (plain / "model.safetensors").read_bytes()
    child = multiprocessing.get_context("fork").Process(target=_killed_after, args=(renames, made, plain))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert plain.exists() == (left == "new")
    with pytest.raises(PaleyError, match="exists already"):
        dequantize(made, output=plain)
    assert ((plain / "model.safetensors").read_bytes() == old) == (left == "old")
    dequantize(made, output=plain, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]
    assert json.loads((plain / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_after_a_kill_halfway_costs_nothing(made, tmp_path, overwrite):
    torch.set_num_threads(1)
    plain, aside = tmp_path / "plain", tmp_path / ".plain.tmp" / "replaced"
    dequantize(made, output=plain, dtype="float32")
    old = (plain / "model.safetensors").read_bytes()
    child = multiprocessing.get_context("fork").Process(target=_killed_after, args=(1, made, plain))
    child.start()
    child.join()
    plain.mkdir()
    (plain / "results.json").write_text('{"run": "another"}')
    with pytest.raises(PaleyError, match="exists already"):
        dequantize(made, output=plain, overwrite=overwrite)
    assert (aside / "model.safetensors").read_bytes() == old
    assert (plain / "results.json").read_text() == '{"run": "another"}'
    shutil.rmtree(plain)
    with pytest.raises(PaleyError, match="exists already"):
        dequantize(made, output=plain)
    assert (plain / "model.safetensors").read_bytes() == old
    dequantize(made, output=plain, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]


def test_stopped_while_it_replaces_it_puts_the_old_one_back(made, tmp_path, monkeypatch):
    plain = tmp_path / "plain"
    dequantize(made, output=plain, dtype="float32")
    rename = Path.rename

    def stop(self: Path, target: Path) -> None:
        if target == plain and self.name == "new":
            raise KeyboardInterrupt
        rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        dequantize(made, output=plain, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "plain"]
    assert json.loads((plain / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_on_the_same_output_is_refused(made, tmp_path, overwrite):
    seen = []

    def beside(total: int, name: str) -> None:
        with pytest.raises(PaleyError, match="plain: another run is at work on it"):
            dequantize(made, output=tmp_path / "plain", overwrite=overwrite)
        seen.append(name)

    dequantize(made, output=tmp_path / "plain", on_tensor=beside)
    assert seen
    assert plain_logits(tmp_path / "plain").isfinite().all()


def test_one_shard_at_a_time(made, tmp_path, monkeypatch):
    held = []
    add = ShardWriter.add

    def watch(self, name, tensor, *, own=False):
        add(self, name, tensor, own=own)
        held.append(self._pending_bytes)

    monkeypatch.setattr(ShardWriter, "add", watch)
    monkeypatch.setattr("paley.export.plain._SHARD", 20_000)
    monkeypatch.setattr("paley.export.plain._CHUNK", 100)
    dequantize(made, output=tmp_path / "plain")
    largest = max(i.nbytes for i in Checkpoint.open(tmp_path / "plain").infos.values())
    assert max(held) <= max(20_000, largest)
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()
    assert_undone(made, tmp_path / "plain", 5e-3)


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_verb_says_what_it_made_and_what_to_type_next(made, tmp_path):
    code, out, _ = run("dequantize", made, "--output", tmp_path / "plain")
    assert code == 0
    assert f"written to {tmp_path / 'plain'}\n" in out
    assert f"next: paley generate {tmp_path / 'plain'}" in out
    code, out, _ = run("dequantize", made, "--output", tmp_path / "other", "--json")
    found = json.loads(out)
    assert (found["output"], found["dropped"]) == (str(tmp_path / "other"), [])
    assert found["bytes"] > found["quantized_bytes"]


def test_the_verb_names_the_option_for_a_value_that_does_not_fit(made, tmp_path):
    file = unseal(made) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.scales"][3] = 60000.0
    save_file(tensors, file, metadata={"format": "pt"})
    _, _, err = run("dequantize", made, "--output", tmp_path / "plain")
    assert err.endswith("does not fit torch.float16; set --dtype float32 or --dtype bfloat16\n")


def test_the_verb_leaves_a_path_as_it_is_written(tmp_path):
    folder = tmp_path / "runs" / "dtype=float16" / "m"
    _, _, err = run("dequantize", folder, "--output", tmp_path / "plain")
    assert str(folder) in err


def test_the_verb_refuses_by_name_and_drops_aloud(rounding, tmp_path):
    code, out, err = run("dequantize", rounding, "--output", tmp_path / "plain")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {rounding}: an ordinary checkpoint cannot round")
    assert not (tmp_path / "plain").exists()
    code, out, _ = run("dequantize", rounding, "--output", tmp_path / "plain", "--weights-only")
    assert code == 0
    assert "dropped: rounding of 14 linear inputs to " in out


def test_what_is_left_out_and_no_rounding_is_not_called_one(tmp_path, tiny_tokenizer):
    """A tied pair on a widened stream: what its final norm leaves out."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    recipe = apply_settings(preset("higgs-4"), ["test=null", "rotate=folded", "expand_mlp=auto", "expand=12"])
    out = quantize(model, recipe, output=tmp_path / "out").output
    _, shown, _ = run("dequantize", out, "--output", tmp_path / "plain", "--weights-only")
    assert "dropped: errors outside of 48 of the stream's 60 directions, in the final norm" in shown
