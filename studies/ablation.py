"""What is each part of the presets worth, in loss, minutes and memory? Writes studies/results/ablation-MODEL.json.

python -m studies.ablation MODEL --text FILE --test-text FILE [--only RE]
A row is a preset with one part changed. Each runs as `paley.quantize` in a process of its own, so that seconds and peak
memory are those of a whole run, from the checkpoint to the score. Rows that --only leaves out stay as they were.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from bench.record import Clock, provenance, save
from studies.experiment import BLOCKS_ALONE, RESULTS, Subject, read

import paley
from paley.model.loading import open_source
from paley.pipeline.accounting import parameter_count
from paley.recipe import Recipe, apply_settings, preset

STREAM = ("compensate_share=1",)
# Group -> its preset, and what a row's name changes: settings, or another preset.
GROUPS: dict[str, tuple[str, dict[str, str | tuple[str, ...]]]] = {
    "weights": (
        "w4a16",
        {
            "without a diagonal": ("diagonal=false",),
            "rotations folded": ("rotate=folded",),
            "without rotations": ("rotate=none", "weights.group_size=64"),
            "pairs": ("weights.grid=p2n256",),
            "single values": ("weights.grid=p1n16",),
            "aims at outputs for its own inputs": ("compensate=plain",),
            "aims at the original's outputs": ("compensate=quantized_inputs",),
            "to nearest": ("weights.method=nearest", "weights.scale_search=unbiased", "diagonal=true"),
            "tuned": ("tune={sequences: 32}",),
        },
    ),
    "weights of 3 bits": (
        "w3a16",
        {
            "without a diagonal": ("diagonal=false",),
            "vectors": ("weights.grid=p4n4096",),
            "aims at outputs for its own inputs": ("compensate=plain",),
            "tuned": ("tune={sequences: 32}",),
        },
    ),
    "inputs": (
        "w16a4kv16",
        {
            "rotations folded": ("rotate=folded",),
            "groups of 64": ("inputs.group_size=64",),
            "even steps": ("inputs.grid=int4", "inputs.scale=absmax", "inputs.clip_ratio=0.9"),
            "4.5 bits on average": "w16a4.5kv16",
            "5 bits": "w16a5kv16",
        },
    ),
    "keys and values": (
        "w16a16kv4",
        {
            "keys as they are": ("center_keys=false",),
            "keys not balanced": ("balance_keys=false",),
            "not rotated": ("rotate=none",),
        },
    ),
    "all": (
        "w4a4kv4",
        {
            "without a diagonal": ("diagonal=false",),
            "rotations folded": ("rotate=folded",),
            "tuned": ("tune={sequences: 32}",),
            "4.5 bits of inputs on average": "w4a4.5kv4",
            "with inputs of 8 bits": "w4a8kv4",
            "aims at outputs for its own inputs": ("compensate=plain",),
            "aims at the residual stream": STREAM,
            "so, without a diagonal": (*STREAM, "diagonal=false"),
            "so, rotations folded": (*STREAM, "rotate=folded"),
            "so, rotations folded, 64 dimensions more": (*STREAM, "rotate=folded", "expand=64"),
            "so, pairs": (*STREAM, "weights.grid=p2n256"),
            "so, inputs in groups of 64": (*STREAM, "inputs.group_size=64"),
        },
    ),
    "without data": ("balanced-4", {"without a diagonal": "higgs-4"}),
}


def rows() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> preset and settings."""
    found = {}
    for group, (base, changes) in GROUPS.items():
        found[f"{group}: as {base}"] = base + BLOCKS_ALONE, ()
        for name, change in changes.items():
            other = isinstance(change, str)
            found[f"{group}: {name}"] = (change if other else base) + BLOCKS_ALONE, () if other else change
    return found


def recipe_of(name: str, arguments: Namespace) -> Recipe:
    base, changes = rows()[name]
    calibration = [] if base.startswith(("balanced", "higgs")) else [
        f"calibration.source={arguments.text}", f"calibration.sequences={arguments.calibration}",
        f"calibration.seq_len={arguments.seq_len}",
    ]  # fmt: skip
    test = [f"test.source={arguments.test_text or arguments.text}", f"test.sequences={arguments.test}"]
    return apply_settings(preset(base), [*calibration, *test, f"test.seq_len={arguments.seq_len}", *changes])


def measure(model: str, recipe: Recipe) -> dict:
    """Runs in a process of its own, so that peak memory is this run's."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        results = paley.quantize(model, recipe, output=Path(folder) / "out", monitor=clock).results
    clock.end()
    score = results.evaluation
    assert score is not None
    return {
        "kl": score.kl, "kl_stderr": score.kl_stderr, "perplexity": score.perplexity, "bytes": results.bytes,
        "top1_agreement": score.top1_agreement,
        "bits": results.bits_per_quantized_weight, "seconds": {name: round(s, 1) for name, s in clock.stages.items()},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def main() -> None:
    parser = Subject.parser(__doc__, calibration=16, search=0, test=8)
    parser.add_argument("--only", default="", help="rows that this expression finds; others stay as they were")
    parser.add_argument("--one", help="that row alone, as JSON on the standard output")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, recipe_of(arguments.one, arguments))))
        return
    subject = Subject.of(arguments)
    what = {
        "model": subject.name,
        "parameters": parameter_count(open_source(subject.model)),
        "text": {"calibration": Path(subject.text).name, "test": Path(subject.test_text or subject.text).name},
        "sequences": {"calibration": subject.calibration, "test": subject.test},
        "seq_len": subject.seq_len,
    }
    file = RESULTS / f"ablation-{subject.name}.json"
    kept = read(file.name) or {"rows": {}}
    if any(kept.get(key, value) != value for key, value in what.items()):
        raise SystemExit(f"{file}: its rows have other text or sizes; give the same, or delete it")
    for name in filter(re.compile(arguments.only).search, rows()):
        command = [sys.executable, "-m", "studies.ablation", *sys.argv[1:], "--one", name]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            print(f"{name}: {(made.stderr.strip().splitlines() or [f'exit {made.returncode}'])[-1]}", flush=True)
            continue
        preset_name, settings = rows()[name]
        row = json.loads(made.stdout.splitlines()[-1]) | {
            "preset": preset_name, "settings": settings, "commit": provenance()["commit"],
        }  # fmt: skip
        found = kept["rows"] | {name: row}
        kept["rows"] = {known: found[known] for known in rows() if known in found}
        print(f"{name:60s} KL {row['kl']:.4f} ± {row['kl_stderr']:.4f}  {sum(row['seconds'].values()):.0f} s  "
              f"{row['peak_bytes'] / 1e9:.2f} GB", flush=True)  # fmt: skip
        save(what | provenance() | {"rows": kept["rows"]}, file)


if __name__ == "__main__":
    main()
