"""A mixture of experts larger than memory beside a dense model: writes bench/results/streaming-experts.json.

    python -m bench.streaming_experts FOLDER [--layers 5] [--dense-layers 12] [--keep]

Makes random Qwen3-MoE weights in FOLDER, with the widths of Qwen3-30B-A3B and its 128 experts a layer (3.4 billion
parameters in 5 layers), one matrix for each expert as published files have them, and a dense LLaMA with the widths of
Llama-3.2-3B. Each is quantized with HIGGS as a command of its own, in one process. Measured: weights a second, also a
second of processor time, which other work on the machine changes little; peak memory; `paley verify` beside sha256sum.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from bench.record import RESULTS, provenance, save
from bench.streaming import command, fill, make, run
from transformers import Qwen3MoeConfig

from paley.format.checkpoint import Checkpoint


def make_experts(folder: Path, layers: int) -> None:
    fill(folder, Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        tie_word_embeddings=True, dtype=torch.bfloat16, architectures=["Qwen3MoeForCausalLM"],
    ))  # fmt: skip


def measured(model: Path, output: Path) -> dict:
    """One run, without anything of an earlier one."""
    for folder in (output, output.with_name(output.name + ".run")):
        shutil.rmtree(folder, ignore_errors=True)
    found = run(command(model, output))
    parameters = Checkpoint.open(model).nbytes // 2
    rates = {
        f"weights_a_{key.removesuffix('s')}": round(parameters / found[key]) for key in ("seconds", "processor_seconds")
    }
    return {"parameters": parameters, **found, **rates}


def verified(output: Path) -> dict:
    """`paley verify` and sha256sum of the same files, which are in memory by then."""
    files = [str(file) for file in sorted(output.iterdir()) if file.is_file()]
    run(["sha256sum", *files])
    script = "from paley_command import main; main()"
    return {
        "bytes": sum(Path(file).stat().st_size for file in files),
        "verify": run([sys.executable, "-c", script, "verify", str(output)]),
        "sha256sum": run(["sha256sum", *files]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--dense-layers", type=int, default=12)
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is at the end")
    arguments = parser.parse_args()
    result = provenance()
    for name, layers, maker in (("dense", arguments.dense_layers, make), ("experts", arguments.layers, make_experts)):
        model, output = arguments.folder / name, arguments.folder / f"{name}-out"
        if not model.exists():
            maker(model, layers)
        result[name] = measured(model, output)
        print(name, result[name], flush=True)
    result["verifying"] = verified(arguments.folder / "experts-out")
    save(result, RESULTS / "streaming-experts.json")
    print(json.dumps(result, indent=1))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
