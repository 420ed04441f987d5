"""The command line, run on a random model of two layers."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import paley
from command_line import paley_
from paley.cli.process import spread_settings
from paley.cli.progress import LineMonitor, watching

SIZES = [
    "--set",
    "calibration.sequences=4",
    "calibration.seq_len=64",
    "search.sequences=2",
    "search.seq_len=64",
    "search.iterations=2",
    "test.sequences=4",
    "test.seq_len=64",
]
VERBS = (
    "quantize",
    "plan",
    "sensitivity",
    "eval",
    "generate",
    "chat",
    "serve",
    "inspect",
    "dequantize",
    "export",
    "verify",
    "presets",
)


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A model, a text, and what `paley quantize` made of them: once, for no test changes them."""
    folder = tmp_path_factory.mktemp("cli")
    model, text, out = folder / "model", folder / "text.txt", folder / "out"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    words = [f"{n} {'abcdefg'[n % 7] * (n % 5 + 1)} story number {n * n}." for n in range(900)]
    text.write_text("\n<|endoftext|>\n".join(" ".join(words[i : i + 9]) for i in range(0, 900, 9)))
    args = ["quantize", model, "--preset", "gbs-w3a3kv3", "--output", out, "--calibration", text, *SIZES]
    return SimpleNamespace(model=model, text=text, out=out, args=args, run=paley_(*args, "--json"))


def test_quantize_json_is_one_object_and_progress_goes_to_stderr(made):
    found = json.loads(made.run.out)
    assert found.keys() == {"output", "seconds", "peak_memory_bytes", "results"}
    assert found["output"] == str(made.out)
    assert found["results"] == paley.Results.load(made.out / "results.json").to_dict()
    versions = {"paley": paley.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    assert found["results"]["made_with"] == versions
    stages = [line.split(" s  ")[1] for line in made.run.err.splitlines()]
    assert stages[0] == "checking the checkpoint"
    assert "searching clip ratios" in stages
    assert not (made.out.with_name("out.run")).exists()


def test_a_dry_run_estimates_and_makes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["quantize", made.model, "--preset", "gbs-w3a3kv3", "--calibration", made.text, *SIZES, "--dry-run"]
    found = json.loads(paley_(*args, "--json").out)
    assert found["bytes"] == json.loads(made.run.out)["results"]["bytes"]
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
    shown = paley_(*args, "--output", "out").out
    for row in ("quantizing weights", "in all, about", "peak memory, about", f"{found['bytes']:,}"):
        assert row in shown
    assert re.search(rf"bytes beside it until it is done +{found['states']:,} *\n", shown)
    tuned = [*args, "--set", "tune={sequences: 2}"]
    assert json.loads(paley_(*tuned, "--json").out)["states"] == 0
    assert "beside it" not in paley_(*tuned).out
    assert list(tmp_path.iterdir()) == []
    assert "Missing option '--output'" in paley_(*args[:-1], code=2).err


def test_quantize_says_beforehand_what_it_will_take(made):
    stages = [line.split(" s  ")[1] for line in made.run.err.splitlines()]
    pattern = r"estimate: \d+ s, [\d.]+ GiB of memory, [\d.]+ MB on disk \(the original [\d.]+\), .+ MB beside it .*"
    assert re.fullmatch(pattern, stages[1])


def test_quantize_shows_a_table_and_what_to_type_next(made, tmp_path):
    args = [
        "quantize",
        made.model,
        "--preset",
        "rtn-w4a16",
        "--output",
        tmp_path / "o",
        "--test",
        made.text,
        *SIZES,
    ]
    out = paley_(*args).out
    for row in ("perplexity", "KL divergence", "bits per weight", "bytes on disk", "seconds", "peak memory"):
        assert row in out
    (cache,) = (line.split() for line in out.splitlines() if "KV cache" in line)
    assert cache[-2:] == ["256", "256"]  # 2 layers, K and V, 1 head of 32, 2 bytes; unquantized in both
    assert f"written to {tmp_path / 'o'}; each layer: paley inspect {tmp_path / 'o'}" in out
    report = next(line for line in out.splitlines() if line.startswith("where its bytes and errors are: paley "))
    assert shlex.split(report)[-4:] == ["report", str(tmp_path / "o"), "--against", str(made.model)]
    paley_(*shlex.split(report)[-4:])
    assert (tmp_path / "o-report.html").exists()
    command = next(line for line in out.splitlines() if line.startswith("next: paley "))
    assert paley_(*shlex.split(command)[2:], "--max-new-tokens", 3).err.startswith("prompt: ")


def test_a_model_that_stays_unquantized_is_not_to_be_inspected(made, tmp_path):
    args = ["quantize", made.model, "--preset", "w16a16", "--output", tmp_path / "o", "--calibration", made.text]
    out = paley_(*args, *SIZES).out
    assert f"written to {tmp_path / 'o'}\n" in out
    assert "inspect" not in out
    assert f"next: paley generate {tmp_path / 'o'}" in out
    assert "is no Paley checkpoint" in paley_("inspect", tmp_path / "o", code=2).err


def test_an_existing_output_is_replaced_only_with_overwrite(made, tmp_path):
    out = tmp_path / "o"
    args = ["quantize", made.model, "--preset", "rtn-w4a16", "--output", out, "--test", made.text, *SIZES]
    paley_(*args, "--json")
    (out / "mine.txt").touch()
    args += ["--seed", 1, "--json"]
    assert "exists already" in paley_(*args, code=2).err
    assert (out / "mine.txt").exists()
    paley_(*args, "--overwrite")
    assert not (out / "mine.txt").exists()


def test_a_plan_executed_gives_the_bytes_that_quantize_gave(made, tmp_path):
    plan = tmp_path / "plan.json"
    args = ["plan", made.model, "--preset", "gbs-w3a3kv3", "--output", plan, "--calibration", made.text, *SIZES]
    shown = paley_(*args).out
    assert "16 of 16 quantized" in shown
    assert f"written to {plan}" in shown
    assert "exists already" in paley_(*args, code=2).err
    paley_("quantize", made.model, "--plan", plan, "--output", tmp_path / "o")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (made.out / name).read_bytes()


def test_plan_json_is_one_object_that_holds_the_plan(made, tmp_path):
    plan = tmp_path / "plan.json"
    args = ["plan", made.model, "--preset", "w3a3kv3", "--output", plan, "--calibration", made.text, *SIZES]
    found = json.loads(paley_(*args, "--json").out)
    assert found.keys() == {"output", "seconds", "peak_memory_bytes", "plan"}
    assert found["output"] == str(plan)
    assert found["plan"] == json.loads(plan.read_text())


def started(*args: str, before: str = "") -> subprocess.Popen[str]:
    """The console script in a process of its own; before: code to run first."""
    source = str(Path(paley.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom paley_command import main; main()", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": source},
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip


def importing(module: str) -> subprocess.Popen[str]:
    """The console script, which has come to the import of `module`."""
    watch = f"""if True:
        import sys
        class Watch:
            def find_spec(name, *rest):
                if name == {module!r}:
                    print(name, flush=True)
        sys.meta_path.insert(0, Watch)"""
    process = started("presets", before=watch)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{module}\n"
    return process


@pytest.mark.parametrize("module", ["torch", "numpy", "transformers"])
def test_sigint_during_the_imports_ends_quietly(module):
    process = importing(module)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


def test_sigint_during_the_imports_ends_it_where_nobody_reads_the_errors_either():
    process = importing("torch")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert (process.wait(timeout=60), process.stdout.read()) == (130, "")
    process.stdout.close()


def test_sigint_while_its_processes_begin_ends_in_the_two_lines_alone(made, tmp_path):
    out = tmp_path / "out"
    process = started(
        "quantize", str(made.model), "--preset", "higgs-4", "--no-score", "--workers=2", f"--output={out}"
    )
    assert process.stderr is not None
    while "quantizing weights" not in (line := process.stderr.readline()):
        assert line, "it ended too early"
    time.sleep(0.5)  # they import torch now
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line.partition(";")[0].split()[0] for line in err.splitlines()] == ["stopped", "paley"], err


def test_sigint_leaves_a_run_that_the_printed_command_finishes(made, tmp_path):
    args = [str(arg) for arg in made.args]
    args[args.index("--output") + 1] = str(tmp_path / "an output")
    process = started(*args)
    assert process.stderr is not None
    while "for the search" not in (line := process.stderr.readline()):
        assert line, "it ended too early"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"is kept in {tmp_path / 'an output.run'}" in err
    assert "Traceback" not in err
    command = shlex.split(err.splitlines()[-1])
    assert command == ["paley", *args, "--resume"]
    paley_(*command[1:])
    assert paley.Plan.load(tmp_path / "an output/plan.json") == paley.Plan.load(made.out / "plan.json")


def test_eval_repeats_the_scores_of_the_run(made):
    found = json.loads(paley_("eval", made.out, "--against", made.model, "--json").out)
    recorded = paley.Results.load(made.out / "results.json").to_dict()["evaluation"]
    assert recorded.items() <= found.items()
    assert found["kl"] > 0


def test_eval_takes_any_model_and_text(made):
    args = ["eval", made.model, "--data", made.text, "--sequences", 3, "--seq-len", 32]
    found = json.loads(paley_(*args, "--json").out)
    assert (found["sequences"], found["tokens"], found["kl"]) == (3, 93, None)
    assert f"scored on 93 tokens in 3 sequences of {made.text}" in paley_(*args).out


def test_eval_refuses_text_that_the_plan_was_tuned_on(made, tmp_path, monkeypatch):
    (tmp_path / "link.txt").symlink_to(made.text)
    monkeypatch.chdir(made.text.parent)
    for name in (made.text, "text.txt", tmp_path / "link.txt"):
        err = paley_("eval", made.out, "--data", name, code=2).err
        assert f"--data {name}: {made.out} was tuned on this text" in err
        assert "leave --data out" in err
    (tmp_path / "other.txt").write_text(made.text.read_text().replace("story", "tale"))
    found = json.loads(paley_("eval", made.out, "--data", tmp_path / "other.txt", "--json").out)
    assert (found["sequences"], found["tokens"]) == (4, 252)
    assert found["sha256"] != json.loads((made.out / "results.json").read_text())["evaluation"]["sha256"]


def test_eval_says_in_its_own_options_that_a_text_is_too_short(made, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    err = paley_("eval", made.out, "--data", tmp_path / "short.txt", code=2).err
    assert "use shorter sequences (--seq-len)" in err


def test_generate_streams_what_json_holds(made):
    args = ["generate", made.out, "A story", "--max-new-tokens", 12]
    found = json.loads(paley_(*args, "--json").out)
    assert found["prompt_tokens"] == 7
    assert 1 < found["tokens"] <= 12  # a random model may end its text
    assert found["kv_cache_bytes"] > 0
    assert found["tokens_per_second"] > 0
    shown = paley_(*args)
    assert shown.out == found["text"] + "\n"
    assert f"{found['tokens']} tokens at" in shown.err


def test_generate_samples_by_its_seed(made):
    args = ["generate", made.out, "A story", "--max-new-tokens", 30, "--temperature", 2]
    texts = [paley_(*args, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_inspect_lists_each_slot_and_every_byte(made):
    found = json.loads(paley_("inspect", made.out, "--json").out)
    assert len(found["linears"]) == 14 + 2
    assert (
        sum(slot["bytes"] for slot in found["linears"].values()) + sum(found["untouched_bytes"].values())
        == found["bytes"]
    )
    assert all(slot["rel_error"] > 0 for slot in found["linears"].values())
    shown = paley_("inspect", made.out).out
    assert "rel_error: ‖W − Ŵ‖² / ‖W‖² against the rotated weight, not an output error" in shown
    for name in (
        *found["linears"],
        *found["attentions"],
        "lm_head",
        "norms and biases",
        "bits per weight",
    ):
        assert name in shown


def test_presets_and_version_and_help():
    shown = paley_("presets").out
    assert "[METHOD-]W<bits>" in shown
    assert "quarot-w4a4kv4" in shown
    assert paley_("--version").out == f"paley {paley.__version__}\n"
    assert all(verb in paley_("--help").out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    assert f"Example: paley {verb}" in paley_(verb, "--help").out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("quantize NO_MODEL --preset w4a4kv4 --output OUT", "NO_MODEL: no such folder"),
        ("quantize MODEL --preset quaro-w4a4kv4 --output OUT", "did you mean 'quarot'?"),
        ("quantize MODEL --output OUT", "--preset NAME (w4a4kv4"),
        ("quantize MODEL --preset w4a4kv4 --recipe r.yaml --output OUT", "--preset and --recipe exclude"),
        ("quantize MODEL --preset w4a4kv4 --set serch.sequences=4 --output OUT", "did you mean 'search'?"),
        ("quantize MODEL --preset w4a4kv4 --expand wide --output OUT", "expand"),
        ("quantize MODEL --preset w4a4kv4 --calibration no.txt --output OUT SIZES", "no.txt: no such text file"),
        ("quantize MODEL --plan no.json --output OUT", "no.json: no such plan"),
        ("quantize MODEL --recipe no.yaml --output OUT", "no.yaml: no such recipe"),
        ("quantize MODEL --preset w4a4kv4 --output OUT --device tpu", "--device tpu: no such device"),
        ("quantize MODEL --preset w4a4kv4 --output OUT --device cuda:99", "use cpu"),
        ("quantize MODEL --preset w4a4kv4 --output .", ".: exists already"),
        ("quantize MODEL --preset w4a4kv4 --output /", "/: is no name for a new folder"),
        ("plan MODEL --preset w4a4kv4 --output no/plan.json", "there is no folder no"),
        ("plan MODEL --preset w4a4kv4 --overwrite --output .", ".: is a folder"),
        ("inspect MODEL", "is no Paley checkpoint"),
        ("inspect NO_MODEL", "no such folder"),
        ("eval NO_MODEL", "no such folder"),
        ("generate NO_MODEL x", "no such folder"),
        ("generate MODEL x --max-new-tokens 128", "use --max-new-tokens 127"),
        ("generate MODEL LONG", "use a shorter prompt"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(made, tmp_path, monkeypatch, args, complaint):
    monkeypatch.chdir(tmp_path)
    words = [word for arg in args.split() for word in {"SIZES": SIZES, "LONG": ["x" * 128]}.get(arg, [arg])]
    shown = paley_(*(made.model if word == "MODEL" else word for word in words), code=2)
    assert shown.out == ""
    assert complaint in shown.err.splitlines()[-1]
    assert shown.err.splitlines()[-1].startswith("error: ")
    assert not Path("OUT").exists()


def test_a_plan_is_not_changed_by_settings(made):
    args = ["quantize", made.model, "--plan", made.out / "plan.json", "--seed", 3, "--output", "never"]
    assert "'seed=3' would change it" in paley_(*args, code=2).err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "error: memory is full"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            2,
            "error: memory is",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: the GPU's memory is full"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "OUT.run"), 2, "error: OUT.run: Read-only file system;"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("a bug"), 1, ""),
        (OSError(errno.EIO, "a broken disk"), 1, ""),
    ],
)
def test_what_the_machine_lacks_is_said_and_a_bug_keeps_its_traceback(made, monkeypatch, error, code, said):
    def fail(folder):
        raise error

    monkeypatch.setattr(paley, "inspect", fail)
    assert paley_("inspect", made.out, code=code).err.startswith(said)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("m --set a=1 b.c=2 --json", "m --set a=1 --set b.c=2 --json"),
        ("--set a=1 m b=2", "--set a=1 m b=2"),
        ("--set a=1 --set b=2 c=3 m", "--set a=1 --set b=2 --set c=3 m"),
        ("--set a=1 ./b=2", "--set a=1 ./b=2"),
        ("m a=1 --set", "m a=1 --set"),
    ],
)
def test_one_set_takes_several_settings(typed, meant):
    assert spread_settings(typed.split()) == meant.split()


def test_without_a_terminal_lines_are_sparse():
    now, lines = [100.0], []
    monitor = LineMonitor(lines.append, lambda: now[0])
    monitor.stage("quantizing", 30)
    for _ in range(30):
        now[0] += 1
        monitor.step("a layer")
    monitor.note("done")
    assert lines == [
        "     0 s  quantizing",
        "    10 s  quantizing 10/30, 0:20 left  a layer",
        "    20 s  quantizing 20/30, 0:10 left  a layer",
        "    30 s  quantizing 30/30, 0:00 left  a layer",
        "    30 s  done",
    ]


def test_a_terminal_shows_each_stage_and_the_layer_at_work(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with watching() as monitor:
        monitor.stage("reading", 1)
        monitor.expect({"quantizing": 3000.0})
        monitor.stage("quantizing", 3)
        monitor.step("layer 0  rel_error 0.0123")
        monitor.note("a layer stays as it is")
    shown = screen.getvalue()
    assert "✓ reading" in shown
    assert "✓ quantizing" in shown
    assert re.search(r"\d+:\d\d left, peak memory", shown)
    assert "layer 0  rel_error 0.0123" in shown
    assert "a layer stays as it is" in shown
