"""How far is an estimate from the run? python -m bench.estimates MODEL [--presets NAME ...] [--text FILE] [--test FILE]

Each preset in a process of its own: estimated beside measured, seconds by stage and peak memory. What is off is put
right in `paley.pipeline.estimate.COSTS`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import RESULTS, provenance, save

import paley
from paley.recipe import apply_settings, preset

PRESETS = ("w4a16", "w4a4kv4", "higgs-4")
SIZES = ["calibration.sequences=16", "calibration.seq_len=512", "test.sequences=4", "test.seq_len=512"]


class Clock(paley.Monitor):
    """Seconds of each stage."""

    def __init__(self):
        self.stages: dict[str, float] = {}
        self.stage("", 0)

    def stage(self, name: str, total: int) -> None:
        now = time.perf_counter()
        if self.stages:
            self.stages[self.name] += now - self.start
        self.name, self.start = name, now
        self.stages.setdefault(name, 0.0)


def measure(model: str, name: str, settings: list[str]) -> dict:
    """Runs in a process of its own, so that peak memory is this run's."""
    recipe = apply_settings(preset(name), [*SIZES, *settings])
    expected, clock = paley.estimate(model, recipe), Clock()
    with tempfile.TemporaryDirectory() as folder:
        results = paley.quantize(model, recipe, output=Path(folder) / "out", monitor=clock).results
    clock.stage("", 0)
    stages = {stage: (seconds, clock.stages[stage]) for stage, seconds in expected.stages.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "preset": name, "settings": [*SIZES, *settings], "stages": stages, "memory": (expected.memory, peak),
        "seconds": (expected.seconds, sum(clock.stages.values())), "bytes": (expected.bytes, results.bytes),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--text", help="calibration text, Python's documentation by default")
    parser.add_argument("--test", help="test text, a part of that by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = {"calibration.source": arguments.text, "test.source": arguments.test}
    if arguments.one:
        settings = [f"{key}={value}" for key, value in given.items() if value]
        print(json.dumps(measure(str(arguments.model), arguments.one, settings)))
        return
    rows = []
    for name in arguments.presets:
        command = [sys.executable, "-m", "bench.estimates", *sys.argv[1:], "--one", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(row := json.loads(output.splitlines()[-1]))
        for what, (expected, found) in {**row["stages"], "in all": row["seconds"]}.items():
            print(f"{name:10s} {what:40s} {expected:7.1f} s estimated {found:7.1f} s measured", flush=True)
        memory, peak = (count / 2**30 for count in row["memory"])
        print(f"{name:10s} {'memory':40s} {memory:7.2f} GiB estimated {peak:7.2f} GiB measured", flush=True)
    save(
        {**provenance(), "model": arguments.model.name, "rows": rows},
        RESULTS / f"estimates-{arguments.model.name}.json",
    )


if __name__ == "__main__":
    main()
