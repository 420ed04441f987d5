"""A checkpoint larger than the memory used for it: writes bench/results/streaming.json.

python -m bench.streaming FOLDER [--layers 28] [--keep]
Makes a random LLaMA of 3 billion parameters in FOLDER (bfloat16, shards of 1 GB), quantizes it with HIGGS as a
command of its own, with one process and with two, and once more killed in the middle and resumed. Measured: seconds for
each billion parameters, peak memory of the process and of all processes together, and that the bytes are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench.record import DEMO, RESULTS, provenance, save
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from paley.format.checkpoint import Checkpoint
from paley.format.writer import ShardWriter

PRESET = "higgs-4"


def make(folder: Path, layers: int) -> None:
    """Gaussian weights, tensor by tensor, with the widths of Llama-3.2-3B and tied embeddings."""
    fill(folder, LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    ))  # fmt: skip


def fill(folder: Path, config: Any) -> None:
    """Saves a random model with this config, and the demo model's tokenizer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, max_shard_bytes=10**9) as writer:
        for name, shape in (matrix for item in shapes.items() for matrix in as_published(*item)):
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.add(name, tensor.bfloat16(), own=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def as_published(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A tensor of the model, or, of a stack of experts, a matrix for each, as files have them."""
    if len(shape) < 3:
        yield name, shape
        return
    owner, _, part = name.rpartition(".")
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    for expert in range(shape[0]):
        for own in names:
            yield f"{owner}.{expert}.{own}.weight", (shape[1] // len(names), shape[2])


def command(model: Path, output: Path, *more: str) -> list[str]:
    return [str(Path(sys.executable).with_name("paley")), "quantize", str(model), "--preset", PRESET, "--no-score",
            "--output", str(output), *more]  # fmt: skip


def run(args: list[str], kill_after: float | None = None) -> dict:
    """Runs the command, sampling the memory of it and its children twenty times a second."""
    start, peak_one, peak_all, before = time.time(), 0, 0, processor_seconds()
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        sizes = [_resident(pid) for pid in (process.pid, *_children(process.pid))]
        peak_one, peak_all = max(peak_one, *sizes), max(peak_all, sum(sizes))
        if kill_after is not None and time.time() - start > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    seconds = time.time() - start
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(process.stderr.read() if process.stderr else "failed")
    used = processor_seconds() - before
    return {
        "seconds": round(seconds, 1), "processor_seconds": round(used, 1), "peak_bytes": peak_one,
        "peak_bytes_all_processes": peak_all,
    }  # fmt: skip


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(pid: int) -> int:
    """Bytes of the process's own memory: mapped libraries and code, shared with others, count too."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def digest(folder: Path) -> str:
    """Of all files but those that hold seconds or paths: there are none."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        found.update(file.name.encode())
        with file.open("rb") as opened:
            while chunk := opened.read(2**24):
                found.update(chunk)
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is at the end")
    arguments = parser.parse_args()
    model, outputs = arguments.folder / "model", [arguments.folder / name for name in ("one", "two", "killed")]
    if not model.exists():
        make(model, arguments.layers)
    stored = Checkpoint.open(model)
    billions = stored.nbytes / 2 / 1e9
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(output.with_name(output.name + ".run"), ignore_errors=True)
    one = run(command(model, outputs[0]))
    print("one process", one, flush=True)
    two = run(command(model, outputs[1], "--workers", "2"))
    print("two processes", two, flush=True)
    killed = run(command(model, outputs[2]), kill_after=one["seconds"] / 2)
    finished = len(list((arguments.folder / "killed.run" / "final").glob("*.safetensors")))
    resumed = run(command(model, outputs[2], "--resume"))
    print("killed", killed, "with", finished, "weights done; resumed", resumed, flush=True)
    digests = {digest(output) for output in outputs}
    size = Checkpoint.open(outputs[0]).nbytes
    result = provenance() | {
        "preset": PRESET,
        "parameters": int(billions * 1e9),
        "original_bytes": stored.nbytes,
        "bytes": size,
        "one_process": one | {"seconds_per_billion": round(one["seconds"] / billions, 1)},
        "two_processes": two | {"seconds_per_billion": round(two["seconds"] / billions, 1)},
        "killed": killed | {"weights_done": finished},
        "resumed": resumed,
        "same_bytes": len(digests) == 1,
    }
    save(result, RESULTS / "streaming.json")
    print(json.dumps(result, indent=1))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
