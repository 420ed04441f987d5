"""Does a run that is killed at any moment end in the same bytes? python -m bench.kills MODEL --output FOLDER

One run is left alone. Others are killed (SIGKILL) after a drawn time, resumed, and killed again, until they come to an
end: every file must equal that of the run left alone. A script that was stopped goes on.
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


def finish(arguments: argparse.Namespace, output: Path) -> float:
    """Runs to the end -> seconds."""
    start = time.monotonic()
    subprocess.run([*command(arguments, output), "--resume"], check=True, capture_output=True)
    return time.monotonic() - start


def killed(arguments: argparse.Namespace, output: Path, seconds: float) -> bool:
    """Starts or resumes a run and kills it after `seconds` -> whether it was still at work."""
    line = [*command(arguments, output), "--resume"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
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
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs, and kills.json")
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--text", type=Path, help="calibration text, Python's documentation by default")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--life", type=float, help="longest time before a kill, half of the run's by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    alone, output, file = (arguments.output / name for name in ("alone", "killed", "kills.json"))
    work = output.with_name("killed.run")
    if file.exists():
        result = json.loads(file.read_text())
    else:
        result = {**provenance(), "model": arguments.model.name, "preset": arguments.preset, "settings": SETTINGS,
                  "seed": arguments.seed, "seconds": finish(arguments, alone), "kills": [], "ends": []}  # fmt: skip
        save(result, file)
    expected, kills, ends = contents(alone), result["kills"], result["ends"]
    print(f"left alone: {result['seconds']:.1f} s, {len(expected)} files", flush=True)
    while len(kills) < arguments.kills or work.exists():
        draw = random.Random(f"{result['seed']} {len(kills)} {len(ends)}")
        seconds = draw.random() * (arguments.life or result["seconds"] / 2)
        if len(kills) == arguments.kills:
            finish(arguments, output)
        elif killed(arguments, output, seconds):
            kills.append({"seconds": seconds, "steps_kept": len(list(work.glob("final/*.safetensors")))})
            print(f"{len(kills)}: killed after {seconds:.1f} s, {kills[-1]['steps_kept']} steps kept", flush=True)
        if output.exists() and not work.exists():
            ends.append(contents(output) == expected)
            print(f"came to an end, same bytes: {ends[-1]}", flush=True)
            shutil.rmtree(output)
        save(result, file)
    if not all(result["ends"]):
        raise SystemExit("other bytes")


if __name__ == "__main__":
    main()
