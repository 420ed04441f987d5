"""How far is an estimate from the run? python -m bench.estimates MODEL [--presets NAME ...] [--text FILE] [--test FILE]

Each preset in a process of its own: estimated beside measured, seconds by stage and peak memory, and the loss that was
measured. Rows of other presets stay in the file. What is off is put right in `paley.pipeline.costs`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.record import RESULTS, Clock, provenance, save

import paley
from paley.recipe import apply_settings, preset

PRESETS = ("w4a16", "w4a4kv4", "higgs-4")
SIZES = ["calibration.seq_len=512", "test.sequences=4", "test.seq_len=512"]


def measure(model: str, name: str, settings: list[str]) -> dict:
    """Runs in a process of its own, so that peak memory is this run's."""
    recipe = apply_settings(preset(name), [*SIZES, *settings])
    expected, clock = paley.estimate(model, recipe), Clock()
    with tempfile.TemporaryDirectory() as folder:
        results = paley.quantize(model, recipe, output=Path(folder) / "out", monitor=clock).results
    clock.end()
    score = results.evaluation
    assert score is not None
    stages = {stage: (seconds, clock.stages[stage]) for stage, seconds in expected.stages.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "preset": name, "settings": [*SIZES, *map(_named, settings)], "stages": stages,
        "memory": (expected.memory, peak),
        "seconds": (expected.seconds, sum(clock.stages.values())), "bytes": (expected.bytes, results.bytes),
        "bits_per_weight": results.bits_per_weight, "kl": score.kl, "kl_stderr": score.kl_stderr,
        "perplexity": score.perplexity,
    }  # fmt: skip


def _named(setting: str) -> str:
    """A file by its name alone: rows say nothing of the machine's folders."""
    key, _, value = setting.partition("=")
    return f"{key}={Path(value).name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--calibration", type=int, default=16, help="sequences of 512 tokens, 16 by default")
    parser.add_argument("--text", help="calibration text, Python's documentation by default")
    parser.add_argument("--test", help="test text, a part of that by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = {
        "calibration.sequences": arguments.calibration, "calibration.source": arguments.text,
        "test.source": arguments.test,
    }  # fmt: skip
    if arguments.one:
        settings = [f"{key}={value}" for key, value in given.items() if value]
        print(json.dumps(measure(str(arguments.model), arguments.one, settings)))
        return
    file = RESULTS / f"estimates-{arguments.model.name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for name in arguments.presets:
        command = [sys.executable, "-m", "bench.estimates", *sys.argv[1:], "--one", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(output.splitlines()[-1]) | {"commit": provenance()["commit"]}
        rows = [*(r for r in rows if (r["preset"], r["settings"]) != (name, row["settings"])), row]
        for what, (expected, found) in {**row["stages"], "in all": row["seconds"]}.items():
            print(f"{name:10s} {what:40s} {expected:7.1f} s estimated {found:7.1f} s measured", flush=True)
        memory, peak = (count / 2**30 for count in row["memory"])
        print(f"{name:10s} {'memory':40s} {memory:7.2f} GiB estimated {peak:7.2f} GiB measured", flush=True)
        print(f"{name:10s} KL {row['kl']:.4f} ± {row['kl_stderr']:.4f}", flush=True)
        save({**provenance(), "model": arguments.model.name, "rows": rows}, file)


if __name__ == "__main__":
    main()
