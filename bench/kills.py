"""Does a run that is killed at any moment end in the same bytes? python -m bench.kills MODEL --output FOLDER

One run is left alone. Others are killed (SIGKILL) at moments drawn between their start and its end, and resumed; every
file must equal that of the run left alone. One seed draws the same shares of its time.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.record import RESULTS, provenance, save

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs; that left alone is kept")
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--text", type=Path, help="calibration text, Python's documentation by default")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    alone, killed = arguments.output / "alone", arguments.output / f"killed-{arguments.seed}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(alone, ignore_errors=True)
    whole = finish(arguments, alone)
    expected = contents(alone)
    print(f"left alone: {whole:.1f} s, {len(expected)} files", flush=True)
    rows, draw = [], random.Random(arguments.seed)
    for _ in range(arguments.kills):
        share = draw.random()
        at_work = kill(arguments, killed, share * whole)
        work = killed.with_name(f"{killed.name}.run")
        steps = len(list((work / "final").glob("*.safetensors")))
        seconds = finish(arguments, killed, "--resume")
        same = contents(killed) == expected and not work.exists()
        rows.append({"share": share, "at_work": at_work, "steps": steps, "resumed_seconds": seconds, "same": same})
        print(f"killed at {share:4.0%}, {steps:2d} steps kept: resumed {seconds:.1f} s, same bytes: {same}", flush=True)
        shutil.rmtree(killed)
        save({**provenance(), "model": arguments.model.name, "preset": arguments.preset, "seconds": whole,
              "kills": rows}, RESULTS / f"kills-{arguments.model.name}.json")  # fmt: skip
    if not all(row["same"] for row in rows):
        raise SystemExit("other bytes")


if __name__ == "__main__":
    main()
