"""GPTQ of a checkpoint larger than the memory used for it: writes bench/results/calibrating-large.json.

python -m bench.calibrating_large FOLDER --text T [--layers 28] [--kills 3] [--parts N] [--alone] [--keep]
Makes a random LLaMA with the widths of Llama-3.2-3B in FOLDER (bfloat16, shards of 1 GB) and calibrates it, one block
at a time from the disk: killed (SIGKILL) at drawn moments and resumed, then once left alone. Measured: seconds, peak
memory of the process, and that the bytes are the same. --alone: without the kills. A script that was stopped goes on.
Two thirds of the default recipe's time at these widths are left out: GPTQ aims at the weights, without diagonals and
sweeps.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from bench.record import RESULTS, provenance, save
from bench.streaming import digest, make, run

from paley.format.checkpoint import Checkpoint

PRESET = "vectors-w4a16"
SETTINGS = [
    "calibration.sequences=4", "calibration.seq_len=256", "weights.sweeps=0", "compensate=plain", "diagonal=false",
]  # fmt: skip


def command(model: Path, output: Path, text: Path) -> list[str]:
    """`paley quantize`, by this Python, whatever is installed as `paley`."""
    script = "from paley_command import main; main()"
    return [sys.executable, "-c", script, "quantize", str(model), "--preset", PRESET, "--no-score", "--calibration",
            str(text), "--output", str(output), "--resume", "--set", *SETTINGS]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--life", type=float, default=280, help="longest time before a kill, in seconds")
    parser.add_argument("--parts", type=int, help="end after so many runs of the command; the next call goes on")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is at the end")
    arguments = parser.parse_args()
    model, file = arguments.folder / "model", arguments.folder / "result.json"
    if not model.exists():
        make(model, arguments.layers)
    result = json.loads(file.read_text()) if file.exists() else {
        **provenance(), "parameters": Checkpoint.open(model).nbytes // 2, "layers": arguments.layers,
        "preset": PRESET, "settings": SETTINGS, "runs": {},
    }  # fmt: skip
    left = arguments.parts
    for name, kills in {"killed": 0 if arguments.alone else arguments.kills, "alone": 0}.items():
        if name == "killed" and arguments.alone:
            continue
        parts = result["runs"].setdefault(name, [])
        output = arguments.folder / name
        while not output.exists():
            if left == 0:
                return
            left = None if left is None else left - 1
            share = random.Random(f"{name} {len(parts)}").uniform(0.2, 1)
            life = share * arguments.life if len(parts) < kills else None
            parts.append(run(command(model, output, arguments.text), life))
            kept = len(list(output.with_name(f"{name}.run").glob("final/block-*")))
            parts[-1] |= {"killed": not output.exists(), "blocks_kept": kept}
            print(name, parts[-1], flush=True)
            save(result, file)
    digests = {name: digest(arguments.folder / name) for name in result["runs"]}
    result["same_bytes"] = len(set(digests.values())) == 1
    save(result, RESULTS / "calibrating-large.json")
    print(json.dumps(result, indent=1))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)
    if not result["same_bytes"]:
        raise SystemExit("other bytes")


if __name__ == "__main__":
    main()
