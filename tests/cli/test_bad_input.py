"""Every kind of bad input: exit code 2, a message that says what and what to do, and nothing written or lost."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from paley.cli import app
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "good"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(value):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value

    return lambda folder: edit_tensors(folder, change)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def shard_without_file(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 not looked at")


def packed(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    edit_tensors(folder, lambda t: t.update({UP + ".qweight": t.pop(UP + ".weight").int()}))


UP = "model.layers.0.mlp.up_proj"
MODELS = {
    "unknown architecture": (
        lambda f: edit_config(f, model_type="gpt_neox"),
        r"gpt_neox.*LlamaForCausalLM.*another family's",
    ),
    "missing shard": (shard_without_file, r"model-00002-of-00002\.safetensors"),
    "truncated shard": (truncate, r"model\.safetensors"),
    "corrupted shard": (corrupt, r"model\.safetensors"),
    "pickle": (pickled, r"(?s)pytorch_model\.bin.*safetensors"),
    "config disagrees": (lambda f: edit_config(f, intermediate_size=48), r"disagree|shape|size"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight"),
    "nan": (poison(float("nan")), r"model\.layers\.0\.mlp\.up_proj\.weight.*(?i:nan)"),
    "inf": (poison(float("inf")), r"model\.layers\.0\.mlp\.up_proj\.weight.*(?i:inf)"),
    "already quantized": (packed, r"quantized already \(gptq\)"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "unreachable width": (lambda f: None, r"(?s)hidden size 27.*expand"),
}


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def assert_refused(result, pattern, folder, before):
    code, output = result
    assert code == 2, output
    assert re.search(pattern, output), output
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(name, model, tmp_path):
    change, pattern = MODELS[name]
    change(model)
    extra = ["--expand", "3"] if name == "unreachable width" else []
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--preset", "w4a4kv4", "--output", tmp_path / "out", *extra)
    assert_refused(result, pattern, tmp_path, before)


SETTINGS = {
    "bits out of range": (["--preset", "w9a4"], r"W9 has no grid"),
    "one bit by another method": (("--preset", "rtn-w1a4"), "W1 and the method bwa need each other"),
    "groups wider than the layer": (
        ("--preset", "w1g128a4", "--set", "rotate=folded"),
        r"layers.0.self_attn.q_proj: in_features=24 is no multiple of group_size=128; set a divisor such as 24 "
        r"\(weights.group_size, inputs.group_size\), or fit_groups=true",
    ),
    "groups of inputs": (
        ("--preset", "w1a4", "--set", "rotate=folded", "weights.group_size=24", "inputs.group_size=16"),
        r"q_proj: input: dimension 24 is no multiple of group_size=16; set a divisor such as 12 or 24 "
        r"\(weights.group_size, inputs.group_size\), or fit_groups=true",
    ),
    "more outliers than columns": (
        ("--preset", "w1a4", "--set", "rotate=folded", "weights.group_size=8", "inputs.group_size=8", "outliers=24"),
        r"layers.0.self_attn.q_proj: outliers=24 must be fewer than its in_features=24 columns",
    ),
    "outliers among vectors": (
        ("--preset", "higgs-w2a16", "--set", "outliers=2"),
        r"grid 'p2n16' stands for 2 columns, none of which can be an outlier alone",
    ),
    "unknown preset": (["--preset", "quarto-w4a4kv4"], r"did you mean 'quarot'"),
    "unknown key": (["--preset", "w4a4kv4", "--set", "calibration.sequence=3"], r"did you mean '.*sequences'"),
    "wrong type": (["--preset", "w4a4kv4", "--set", "search.sequences=many"], r"search\.sequences"),
    "clip out of range": (["--preset", "w4a4kv4", "--set", "inputs.clip_ratio=-1"], r"clip_ratio"),
    "group that does not divide": (["--preset", "w4g7a16"], r"group_size=7"),
    "missing text": (["--preset", "w4a4kv4", "--calibration", "nowhere.txt"], r"nowhere\.txt"),
    "neither preset nor recipe": ([], r"--preset"),
    "no such device": (["--preset", "w4a4kv4", "--device", "tpu"], r"tpu"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings(name, model, tmp_path):
    flags, pattern = SETTINGS[name]
    code, output = run("quantize", model, "--output", tmp_path / "out", *flags)
    assert code == 2, output
    assert re.search(pattern, output), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "pattern"), [("", r"empty"), ("Too short.", r"(?i)token")])
def test_bad_text(content, pattern, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(content)
    code, output = run("quantize", model, "--preset", "w4a4kv4", "--calibration", text, "--output", tmp_path / "out")
    assert code == 2
    assert re.search(pattern, output), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["calibration", "test"])
def test_text_with_fewer_tokens_than_asked(role, model, tmp_path):
    """How many there are, and what fits: 300 bytes and a BOS for each block of 16."""
    text = tmp_path / "text.txt"
    text.write_text("x" * 300)
    other = [] if role == "calibration" else ["--test", text]
    calibration = text if role == "calibration" else "pydoc"
    sizes = ["--set", "calibration.seq_len=16", "test.seq_len=16", "calibration.sequences=2", "test.sequences=2"]
    wanted = ["--preset", "w4a16", "--calibration", calibration, *other, *sizes, f"{role}.sequences=50"]
    if role == "calibration":
        wanted += ["--test", "pydoc"]
    before = sorted(p.name for p in tmp_path.iterdir())
    said = rf"text\.txt has 320 tokens, and 50 sequences of 16 need 800; use {role}\.sequences=20, or a longer te"
    assert_refused(run("quantize", model, *wanted, "--output", tmp_path / "out"), said, tmp_path, before)


def test_too_little_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr("paley.pipeline.estimate.free_memory", lambda: 2**20)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--preset", "w4a16", "--output", tmp_path / "out")
    assert_refused(result, r"memory: this run needs about [\d.]+ GiB, and 0\.0 GiB are free; use", tmp_path, before)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("wieghts: null\n", r"did you mean '?weights"),
        ("seed: zero\n", r"seed"),
        ("[1, 2]\n", r"recipe\.yaml"),
        ("a: [", r"recipe\.yaml"),
    ],
)
def test_bad_recipes(content, pattern, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert_refused(result, pattern, tmp_path, before)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("quantize", "someone/some-model", "--preset", "w4a4kv4", "--output", tmp_path / "out")
    assert_refused(result, r"someone/some-model.*(network|reach)", tmp_path, [])


def test_no_such_folder(tmp_path):
    result = run("quantize", tmp_path / "nowhere", "--preset", "w4a4kv4", "--output", tmp_path / "out")
    assert_refused(result, r"no such folder", tmp_path, [])


SLOPES = ["--text", "random", "--sequences", 1, "--seq-len", 8, "--levels", 3]


@pytest.fixture(scope="module")
def slopes(good, tmp_path_factory):
    """What `paley sensitivity` measured of the good model."""
    file = tmp_path_factory.mktemp("slopes") / "alpha.json"
    code, output = run("sensitivity", good, "--output", file, *SLOPES)
    assert code == 0, output
    return file


def edit_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


SENSITIVITIES = {
    "another model": (lambda d: d.update(fingerprint="f00d"), r"of a llama model with fingerprint f00d.*paley sens"),
    "NaN slope": (lambda d: d["slots"][UP].update(alpha=float("nan")), r"up_proj'\]\.alpha: should be a finite"),
    "another version": (lambda d: d.update(version=1), r"version 1, this Paley reads version 2"),
    "missing slot": (lambda d: d["slots"].pop(UP), r"up_proj has no slope.*`paley sensitivity`"),
    "folded": (lambda d: d.update(folded=True), r"measured with the norms' gains.*paley sensitivity --no-fold"),
    "unknown key": (lambda d: d.update(metrics="kl"), r"metrics: unknown key; did you mean 'metric'"),
}


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_bad_sensitivities(name, model, slopes, tmp_path):
    change, pattern = SENSITIVITIES[name]
    file = shutil.copy(slopes, tmp_path / "alpha.json")
    edit_json(file, change)
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments in (["quantize", "--no-score", "--output", tmp_path / "out"], ["plan", "--set", "test=null"]):
        verb, *rest = arguments
        out = ["--output", tmp_path / "plan.json"] if verb == "plan" else []
        result = run(verb, model, "--target-bpw", "4", "--sensitivity", file, *rest, *out)
        assert_refused(result, pattern, tmp_path, before)
        assert "Traceback" not in result[1]


BUDGETS = {
    "too few bits": ("--target-bpw 1.5", r"--target-bpw: 1\.5 bits are out of reach; [\d.]+ to [\d.]+ can be had"),
    "too many bits": ("--target-bpw 33", r"--target-bpw: 33 bits are out of reach; [\d.]+ to [\d.]+ can be had"),
    "no bits": ("--target-bpw 0", r"--target-bpw: should be greater than 0 \(got 0"),
    "no number": ("--target-bpw abc", r"--target-bpw abc: expected .*such as"),
    "not a number": ("--target-bpw nan", r"--target-bpw nan: must be a finite number"),
    "several": ("--target-bpw 2,3", r"--target-bpw 2,3: one model takes one budget; `paley plan` compares"),
    "nothing": ("--target-bpw=", r"--target-bpw : expected"),
    "unknown unit": ("--target-size 4XB", r"--target-size 4XB: expected a size such as 4GB"),
    "too small": ("--target-size 1KB", r"--target-size: 1,000 bytes are out of reach; [\d,]+ to [\d,]+ can be had"),
    "no cache": ("--preset higgs-4 --kv-bpw 4", r"--kv-bpw: this recipe .* such as --preset higgs-w4a16kv4, or set"),
    "no number for the cache": ("--kv-bpw inf", r"--kv-bpw inf: must be a finite number"),
    "slopes without a budget": ("--preset higgs-4 --sensitivity SLOPES", r"--sensitivity serves a budget: give --tar"),
    "no such slopes": ("--target-bpw 4 --sensitivity no.json", r"no\.json: no such sensitivity file"),
    "unmeasured": ("--target-bpw 1.5", r"--target-bpw: 1\.5 bits are out of reach"),
    "too long to measure": ("--target-bpw 4 --set budget.seq_len=4096", r"budget\.seq_len=4096: .*at most 2048 tokens"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_bad_budgets(name, model, slopes, tmp_path):
    line, pattern = BUDGETS[name]
    flags = [slopes if flag == "SLOPES" else flag for flag in line.split()]
    measured = "unmeasured" in name or "too long" in name or "--sensitivity" in flags
    flags += ["--no-score", *([] if measured else ["--sensitivity", slopes])]
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, *flags, "--output", tmp_path / "out")
    assert_refused(result, pattern, tmp_path, before)
    assert "measuring sensitivities" not in result[1]


@pytest.mark.parametrize("budgets", ["3,abc", "3,,4", "1.5,4", "3,33", "3,nan"])
def test_bad_curves(budgets, model, slopes, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("plan", model, "--target-bpw", budgets, "--output", tmp_path / "plan.json")
    assert_refused(result, r"--target-bpw", tmp_path, before)
    assert "measuring sensitivities" not in result[1]


def write_points(*shape, change=lambda points: None):
    def write(file):
        points = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        change(points)
        save_file({"points": points}, file)

    return write


def write_two(file):
    save_file({"points": torch.randn(8, 2), "weights": torch.randn(3)}, file)


def write_truncated(file):
    write_points(16, 2)(file)
    file.write_bytes(file.read_bytes()[:-5])


GRIDS = {
    "wrong shape": (write_points(2, 3, 4), r"my\.safetensors: points must be floats \[n, p\], got .*\[2, 3, 4\]"),
    "too wide": (
        write_points(16, 9),
        r"my\.safetensors: needs 2 to \d+ points in 1 to 8 dimensions, got shape \[16, 9",
    ),
    "one point": (write_points(1, 2), r"my\.safetensors: needs 2 to"),
    "NaN": (write_points(16, 2, change=lambda p: p[3].fill_(float("nan"))), r"my\.safetensors: holds NaN"),
    "twice": (write_points(16, 2, change=lambda p: p[3].copy_(p[2])), r"my\.safetensors: .*same point twice"),
    "integers": (lambda f: save_file({"points": torch.arange(8)[:, None]}, f), r"points must be floats"),
    "two tensors": (write_two, r"my\.safetensors: .*holds one tensor, points \[n, p\], got points, weights"),
    "another name": (lambda f: save_file({"grid": torch.randn(8, 2)}, f), r"one tensor, points \[n, p\], got grid"),
    "not safetensors": (lambda f: f.write_text("points"), r"my\.safetensors: no safetensors file"),
    "truncated": (write_truncated, r"my\.safetensors: truncated"),
    "too large": (
        write_points(16, 2, change=lambda p: p.mul_(1e30)),
        r"my\.safetensors: its points do not fit .*error on N\(0, 1\) is \S+e\+\d\d, .*scale the points",
    ),
    "near 0": (
        write_points(16, 2, change=lambda p: p.mul_(1e-6)),
        r"my\.safetensors: .*scale the points to unit variance",
    ),
    "missing": (lambda f: None, r"my\.safetensors: cannot be read: No such file"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_bad_grids(name, model, tmp_path):
    write, pattern = GRIDS[name]
    file = tmp_path / "my.safetensors"
    write(file)
    before = sorted(p.name for p in tmp_path.iterdir())
    args = ["--preset", "higgs-4", "--grid", file, "--no-score"]
    assert_refused(run("quantize", model, *args, "--output", tmp_path / "out"), pattern, tmp_path, before)


def test_an_unknown_grid_is_no_file(model, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--preset", "higgs-4", "--grid", "p2n65", "--output", tmp_path / "out")
    way_out = r"make_gaussian_grids\.py p2n65 --output p2n65\.safetensors, then --grid p2n65\.safetensors"
    assert_refused(result, r"unknown grid 'p2n65'.*" + way_out, tmp_path, before)


def test_an_older_plan_is_refused_with_its_version(model, tmp_path):
    """It says nothing of embedding and head, and tells rotations apart by other names."""
    plan = tmp_path / "plan.json"
    code, output = run("plan", model, "--preset", "higgs-4", "--set", "test=null", "--output", plan)
    assert code == 0, output
    edit_json(plan, lambda data: data.update(version=1))
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("quantize", model, "--plan", plan, "--output", tmp_path / "out")
    assert_refused(result, r"plan\.json: is a plan of version 1, this Paley reads version 2", tmp_path, before)


def tied(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=True)


OUTER = {
    "a head of a tied pair that is kept": (
        ("--preset", "w4a16e16h6"),
        r"lm_head: shares the weight of model\.embed_tokens .*, which this recipe keeps, .* set embedding to the same",
    ),
    "two grids for a tied pair": (
        ("--preset", "w4a16e5h6"),
        r"lm_head: .*one grid serves both, but head has 'trellis6' and embedding 'trellis5'; set both to one of them",
    ),
    "an unknown letter": (("--preset", "w4x16"), r"preset 'w4x16': .*did you mean 'w4a16'"),
}


@pytest.mark.parametrize("name", OUTER)
def test_bad_embeddings_and_heads(name, model, tmp_path):
    flags, pattern = OUTER[name]
    tied(model)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert_refused(run("quantize", model, *flags, "--output", tmp_path / "out"), pattern, tmp_path, before)


def test_folding_what_a_family_forbids(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "gemma", tiny_tokenizer, gemma=True)
    result = run("quantize", folder, "--preset", "w4a16", "--set", "rotate=folded", "--output", tmp_path / "out")
    assert_refused(result, r"gain of post_attention_layernorm stands .*set rotate=online", tmp_path, ["gemma"])


CONTRADICTIONS = {
    "a plan has its budget": ("--plan PLAN --target-bpw 4", r"executed as it stands, but '--target-bpw' would change"),
    "a plan has its size": (
        "--plan PLAN --target-size 4GB",
        r"executed as it stands, but '--target-size' would change",
    ),
    "a plan needs no slopes": ("--plan PLAN --sensitivity SLOPES", r"--sensitivity serves a budget"),
    "a plan has its grid": ("--plan PLAN --grid p2n64", r"executed as it stands, but '--grid' would change"),
    "scored and not": ("--preset higgs-4 --no-score --test pydoc", r"--no-score and --test exclude each other"),
    "longer than the model": (
        "--preset higgs-4 --set test.seq_len=4096",
        r"test\.seq_len=4096: .*set test\.seq_len=2048",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name, model, slopes, tmp_path):
    line, pattern = CONTRADICTIONS[name]
    plan = tmp_path / "plan.json"
    if "PLAN" in line:
        code, output = run("plan", model, "--preset", "higgs-4", "--set", "test=null", "--output", plan)
        assert code == 0, output
    flags = [{"SLOPES": slopes, "PLAN": plan}.get(flag, flag) for flag in line.split()]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert_refused(run("quantize", model, *flags, "--output", tmp_path / "out"), pattern, tmp_path, before)


def test_sequences_longer_than_the_model_reads(model, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    for verb in ("eval", "sensitivity"):
        rest = ["--output", tmp_path / "alpha.json"] if verb == "sensitivity" else []
        result = run(verb, model, "--seq-len", 2049, *rest)
        assert_refused(result, r"--seq-len 2049: .*at most 2048 tokens.* set --seq-len 2048", tmp_path, before)
