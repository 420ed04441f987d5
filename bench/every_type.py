"""Which of transformers' causal language models does Paley quantize? Writes bench/results/every-type.json.

    python -m bench.every_type [--only TYPE ...] [--seconds 120]

A random model of each type, as small as its config class allows, is quantized by each recipe of tests/every_type.py,
saved, loaded, and compared with the one quantized in memory; and its blocks are run one by one, as GPTQ needs it. Each
type has a process of its own. A script that was stopped goes on; types named by --only are tried again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from bench.record import ROOT, provenance, save

sys.path.insert(0, str(ROOT / "tests"))

from every_type import GPTQ, OUTCOMES, RECIPES, TYPES, judged

ASKED = (*RECIPES, GPTQ)


def _child(kind: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    for recipe in ASKED:
        with tempfile.TemporaryDirectory() as folder:
            pipe.send((recipe, judged(kind, recipe, Path(folder))))


def examine(kind: str, seconds: float) -> dict[str, str]:
    """Recipe -> how it went, in a process forked from this one, which has the libraries."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, there))
    process.start()
    there.close()
    found: dict[str, str] = {}
    try:
        while len(found) < len(ASKED) and here.poll(seconds):
            recipe, outcome = here.recv()
            found[recipe] = outcome
    except EOFError:
        pass
    process.kill()
    process.join()
    return {name: found.get(name, f"no answer in {seconds:.0f} s, or the process ended") for name in ASKED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    version = f"transformers {transformers.__version__}"
    stored = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    outcomes: dict[str, dict[str, str]] = stored.get("types", {}) if stored.get("of") == version else {}
    for kind in arguments.only or [kind for kind in TYPES if kind not in outcomes]:
        start = time.time()
        outcomes[kind] = examine(kind, arguments.seconds)
        print(f"{kind} ({time.time() - start:.0f} s): {outcomes[kind]}", flush=True)
        save(provenance() | {"of": version, "types": dict(sorted(outcomes.items()))}, OUTCOMES)
    print(Counter(outcome.partition(":")[0] for found in outcomes.values() for outcome in found.values()))


if __name__ == "__main__":
    main()
