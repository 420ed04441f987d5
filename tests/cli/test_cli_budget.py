"""The command line on data-free recipes, budgets and grids of one's own, on a random model of two layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import paley
from command_line import paley_
from paley.model.rotation import input_blocks
from tiny_models import save_tiny

SLOPES = ["--text", "random", "--sequences", 2, "--seq-len", 24, "--levels", 3]
MEASURED = ["--set", "budget.source=random", "budget.sequences=2", "budget.seq_len=24", "budget.levels=3"]


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A model, and what `paley sensitivity` measured of it."""
    folder = tmp_path_factory.mktemp("budget")
    model, slopes = folder / "model", folder / "alpha.json"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    paley_("sensitivity", model, "--output", slopes, "--activations", *SLOPES)
    return SimpleNamespace(model=model, slopes=slopes)


def bits_of(inspection: dict, model: Path) -> float:
    """Stored bits for each weight of the linears that `inspect --json` lists."""
    weights = sum(p.numel() for n, p in LlamaForCausalLM.from_pretrained(model).named_parameters() if "norm" not in n)
    return 8 * sum(slot["bytes"] for slot in inspection["linears"].values()) / weights


def grids_of(inspection: dict) -> set[str]:
    return {slot["weight"]["grid"] for slot in inspection["linears"].values() if slot["weight"]}


def test_a_data_free_preset_needs_no_text_and_shares_out_its_work(made, tmp_path):
    args = ["quantize", made.model, "--preset", "higgs-3", "--no-score", "--output"]
    shown = paley_(*args, tmp_path / "o", "--workers", 2)
    assert "not scored: the recipe has no test text; `paley eval OUT --against MODEL`" in shown.out
    assert "perplexity" not in shown.out
    assert "quantizing weights" in shown.err
    found = json.loads(paley_(*args, tmp_path / "alone", "--json").out)
    assert found["results"]["evaluation"] is None
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "alone/model.safetensors").read_bytes()
    inspection = json.loads(paley_("inspect", tmp_path / "o", "--json").out)
    assert grids_of(inspection) == {"p2n64", "p1n64"}
    assert "p2n64 nearest" in paley_("inspect", tmp_path / "o").out
    score = ["eval", tmp_path / "o", "--against", made.model, "--sequences", 2, "--seq-len", 32, "--json"]
    assert json.loads(paley_(*score).out)["kl"] > 0


@pytest.mark.parametrize("measured", [True, False])
def test_a_budget_in_bits_is_met_with_and_without_slopes(made, tmp_path, measured):
    slopes = ["--sensitivity", made.slopes] if measured else MEASURED
    shown = paley_("quantize", made.model, "--target-bpw", 4.2, *slopes, "--no-score", "--output", tmp_path / "o")
    assert ("measuring sensitivities" in shown.err) != measured
    inspection = json.loads(paley_("inspect", tmp_path / "o", "--json").out)
    assert 4.0 < bits_of(inspection, made.model) <= 4.2
    assert len(grids_of(inspection)) > 1
    for grid in grids_of(inspection):
        assert grid in paley_("inspect", tmp_path / "o").out


def test_a_plan_under_a_budget_says_what_it_decided(made, tmp_path):
    args = ["plan", made.model, "--target-bpw", 4.2, "--sensitivity", made.slopes, "--set", "test=null"]
    shown = paley_(*args, "--output", tmp_path / "plan.json").out
    assert "predicted loss" in shown
    plan = paley.Plan.load(tmp_path / "plan.json")
    assert len({slot.weight.grid for slot in plan.linears.values() if slot.weight}) > 1
    paley_("quantize", made.model, "--plan", tmp_path / "plan.json", "--output", tmp_path / "o")


def test_several_budgets_give_a_curve_and_write_nothing(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["plan", made.model, "--target-bpw", "3,3.5,4", "--sensitivity", made.slopes]
    curve = json.loads(paley_(*args, "--json").out)["curve"]
    assert [point["budget"] for point in curve] == [3.0, 3.5, 4.0]
    assert all(point["bits_per_weight"] <= point["budget"] for point in curve)
    losses = [point["predicted_loss"] for point in curve]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] > 0
    assert all(sum(point["grids"].values()) == 14 + 2 for point in curve)
    shown = paley_(*args).out
    assert all(f"{loss:.5f}" in shown for loss in losses)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_in_bytes_is_that_of_the_folder(made, tmp_path):
    args = ["quantize", made.model, "--sensitivity", made.slopes, "--no-score", "--json", "--target-size"]
    found = json.loads(paley_(*args, "250KB", "--output", tmp_path / "o").out)
    assert 235_000 < found["results"]["bytes"] <= 250_000
    err = paley_(*args, "20KB", "--output", tmp_path / "small", code=2).err.splitlines()[-1]
    assert err.startswith("error: --target-size: 20,000 bytes are out of reach; ")
    assert "can be had here" in err
    least = int(err.split("out of reach; ")[1].split(" to ")[0].replace(",", ""))
    found = json.loads(paley_(*args, least, "--output", tmp_path / "least").out)
    assert found["results"]["bytes"] == least


def test_a_budget_for_the_cache(made, tmp_path):
    sizes = ["calibration.sequences=2", "calibration.seq_len=32", "test.sequences=2", "test.seq_len=32"]
    args = ["--preset", "rtn-w4a16kv4", "--kv-bpw", 4, "--sensitivity", made.slopes]
    args += ["--set", *sizes, "search.method=none", "rotate=none", "center_keys=false"]
    paley_("quantize", made.model, *args, "--output", tmp_path / "o")
    found = json.loads(paley_("inspect", tmp_path / "o", "--json").out)
    slots = [slot[what]["grid"] for slot in found["attentions"].values() for what in ("keys", "values")]
    widths = [int(grid[-1]) for grid in slots]
    assert min(widths) >= 2
    assert sum(widths) / len(widths) < 4  # scales and zeros count as well
    shown = paley_("inspect", tmp_path / "o").out
    assert all(grid in shown for grid in slots)


@pytest.mark.parametrize("weights", [["--target-bpw", 4.2], []])
def test_a_budget_for_the_cache_alone_brings_its_schemes(made, tmp_path, weights):
    args = [*weights, "--kv-bpw", 5, "--sensitivity", made.slopes, "--no-score", "--output", tmp_path / "o"]
    shown = paley_("quantize", made.model, *args)
    assert "measuring what rounding loses of keys, values and inputs" in shown.err
    assert "predicted loss" in shown.err
    plan = paley.Plan.load(tmp_path / "o/plan.json")
    assert all(slot.keys and slot.values for slot in plan.attentions.values())
    assert all(slot.weight or slot.transform is None for slot in plan.linears.values())
    assert (len({slot.weight and slot.weight.grid for slot in plan.linears.values()}) > 1) == bool(weights)


def test_few_bits_are_mentioned_once(made, tmp_path):
    args = ["plan", made.model, "--sensitivity", made.slopes, "--set", "test=null", "--output", tmp_path / "plan.json"]
    note = "below 3 bits losses grow faster than predicted"
    assert f"{note} (2.6, 2.8)" in paley_(*args, "--target-bpw", "2.6,2.8,4").err
    shown = paley_(*args, "--target-bpw", "2.6")
    assert shown.err.count(note) == 1
    assert "predicted loss" in shown.out
    assert note not in paley_(*args, "--target-bpw", "4", "--overwrite").err


def test_another_packaged_grid(made, tmp_path):
    paley_("quantize", made.model, "--preset", "higgs-4", "--grid", "p3n64", "--no-score", "--output", tmp_path / "o")
    assert grids_of(json.loads(paley_("inspect", tmp_path / "o", "--json").out)) == {"p3n64", "p1n64"}


LOGITS = """
import json, sys, torch, paley
torch.set_num_threads(1)
with torch.no_grad():
    logits = paley.load(sys.argv[1])(torch.arange(3, 40)[None], use_cache=False).logits
print(json.dumps(logits.double().flatten().tolist()))
"""


@torch.no_grad()
def test_a_grid_from_a_file_is_read_anywhere(made, tmp_path):
    file, out = tmp_path / "my.safetensors", tmp_path / "o"
    points = torch.randn(88, 2, generator=torch.Generator().manual_seed(7))
    save_file({"points": points}, file)
    paley_("quantize", made.model, "--preset", "higgs-4", "--grid", file, "--no-score", "--output", out)
    file.unlink()
    inspection = json.loads(paley_("inspect", out, "--json").out)
    (name,) = grids_of(inspection) - {"p1n64"}  # that of embedding and head
    assert name.startswith("custom-")
    assert name in paley_("inspect", out).out
    code = [sys.executable, "-c", LOGITS, str(out)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(paley.__file__).parents[1])
    want = paley.load(out)(torch.arange(3, 40)[None], use_cache=False).logits.double().flatten()
    assert torch.equal(torch.tensor(json.loads(done.stdout), dtype=torch.float64), want)
    plan, copy = out / "plan.json", tmp_path / "copy"
    paley_("quantize", made.model, "--plan", plan, "--output", copy)
    assert (copy / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_grid_from_a_file_is_a_candidate_under_a_budget(made, tmp_path):
    file = tmp_path / "my.safetensors"
    save_file({"points": torch.randn(300, 2, generator=torch.Generator().manual_seed(7)).half().float()}, file)
    args = ["--grid", file, "--target-bpw", 4.6, "--sensitivity", made.slopes, "--set", "test=null"]
    paley_("plan", made.model, *args, "--output", tmp_path / "plan.json")
    assert paley.Plan.load(tmp_path / "plan.json").linears


def test_processes_that_cannot_share_the_work_are_mentioned(made, tmp_path):
    sizes = ["calibration.sequences=2", "calibration.seq_len=32", "test.sequences=2", "test.seq_len=32"]
    args = ["--preset", "w4a16", "--workers", 2, "--set", *sizes]
    shown = paley_("quantize", made.model, *args, "--output", tmp_path / "o")
    assert "one process is at work, not more" in shown.err


def test_no_score_is_reported_on_the_text_behind_the_slopes(made, tmp_path):
    text, slopes, out = tmp_path / "t.txt", tmp_path / "alpha.json", tmp_path / "o"
    sentences = (f"{i} green bottles hang on a wall of {i * i} stones. " * 4 for i in range(60))
    text.write_text("\n<|endoftext|>\n".join(sentences))
    paley_("sensitivity", made.model, "--output", slopes, "--text", text, *SLOPES[2:])
    test = ["--test", text, "--set", "test.sequences=2", "test.seq_len=32"]
    paley_("quantize", made.model, "--target-bpw", 4.2, "--sensitivity", slopes, *test, "--output", out)
    assert paley.Plan.load(out / "plan.json").recipe.budget.source == str(text)
    assert "tuned on this text" in paley_("eval", out, "--data", text, code=2).err


def test_inspect_names_layers_that_are_not_gaussian(tmp_path, tiny_tokenizer):
    """One linear's rotated rows have two values, +1 and -1; those of all others are Gaussian."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, hidden_size=128, intermediate_size=256)
    name, other = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}.weight" in tensors:
            turned = torch.randint(0, 2, (128, 128), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
            tensors[f"{name}.weight"] = input_blocks(128, 64, 0).adjoint(turned.double()).float().contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
    settings = ["--set", "test=null", "hadamard=64"]
    paley_("quantize", model, "--preset", "higgs-3", *settings, "--output", tmp_path / "o")
    shown = paley_("inspect", tmp_path / "o").out.splitlines()
    said = [line for line in shown if line.startswith("not Gaussian")]
    linears = json.loads(paley_("inspect", tmp_path / "o", "--json").out)["linears"]
    off = {n: slot["rel_error"] / slot["gaussian_error"] - 1 for n, slot in linears.items()}
    where = "below" if off[name] < 0 else "above"
    assert said == [f"not Gaussian: {name}, error {abs(off[name]):.0%} {where} its grid's"]
    assert abs(off[other]) < 0.03
    integers = ["weights.grid=int4", "weights.scale_search=absmax"]
    for kind in (integers, ["weights.grid=int4", "weights.scale_search=rms"]):
        paley_("quantize", model, "--preset", "higgs-3", *settings, *kind, "--output", tmp_path / "o", "--overwrite")
        assert "not Gaussian" not in paley_("inspect", tmp_path / "o").out
        found = json.loads(paley_("inspect", tmp_path / "o", "--json").out)["linears"]
        assert {slot["gaussian_error"] for slot in found.values() if slot["weight"]["grid"] == "int4"} == {None}
