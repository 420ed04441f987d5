"""Does a run that is killed at any moment end in the same bytes? python -m bench.kills MODEL --output FOLDER

One run is left alone. Others are killed (SIGKILL) at moments drawn between their start and its end, and resumed; every
file must equal that of the run left alone. The same seed draws the same shares of its time. A script that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.record import provenance, save

SETTINGS = ["calibration.sequences=8", "calibration.seq_len=256"]


def command(arguments: argparse.Namespace, output: Path) -> list[str]:
    """`paley quantize`, by this Python, whatever is installed as `paley`."""
    text = [] if arguments.text is None else ["--calibration", str(arguments.text)]
    script = "from paley_command import main; main()"
    wanted = ["--preset", arguments.preset, "--output", str(output), "--no-score", "--set", *SETTINGS]
    return [sys.executable, "-c", script, "quantize", str(arguments.model), *wanted, *text]


def finish(arguments: argparse.Namespace, output: Path, *flags: str) -> float:
    """Runs to the end -> seconds."""
    start = time.monotonic()
    subprocess.run([*command(arguments, output), *flags], check=True, capture_output=True)
    return time.monotonic() - start


def kill(arguments: argparse.Namespace, output: Path, seconds: float) -> bool:
    """Starts a run and kills it after `seconds` -> whether it was still at work."""
    with subprocess.Popen(command(arguments, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            return True
    return False


def contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def one(arguments: argparse.Namespace, output: Path, seconds: float) -> dict[str, bool | int | float]:
    """A run that is killed after `seconds` and resumed; same: whether nothing but the output is left."""
    at_work, work = kill(arguments, output, seconds), output.with_name(f"{output.name}.run")
    steps = len(list((work / "final").glob("*.safetensors")))
    resumed = finish(arguments, output, "--resume")
    return {"at_work": at_work, "steps_kept": steps, "resumed_seconds": resumed, "same": not work.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs, and kills.json")
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--text", type=Path, help="calibration text, Python's documentation by default")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    alone, killed = arguments.output / "alone", arguments.output / "killed"
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "kills.json"
    if file.exists() and alone.exists():  # the script was stopped: it goes on
        result = json.loads(file.read_text())
    else:
        shutil.rmtree(alone, ignore_errors=True)
        result = {**provenance(), "model": arguments.model.name, "preset": arguments.preset, "settings": SETTINGS,
                  "seed": arguments.seed, "seconds": finish(arguments, alone), "kills": []}  # fmt: skip
        save(result, file)
    expected, draw = contents(alone), random.Random(result["seed"])
    print(f"left alone: {result['seconds']:.1f} s, {len(expected)} files", flush=True)
    for number in range(arguments.kills):
        share = draw.random()
        if number < len(result["kills"]):
            continue
        for folder in (killed, killed.with_name("killed.run")):
            shutil.rmtree(folder, ignore_errors=True)
        row = {"share": share, **one(arguments, killed, share * result["seconds"])}
        row["same"] = row["same"] and contents(killed) == expected
        print(f"killed at {share:4.0%}: {row}", flush=True)
        result["kills"].append(row)
        save(result, file)
    if not all(row["same"] for row in result["kills"]):
        raise SystemExit("other bytes")


if __name__ == "__main__":
    main()
