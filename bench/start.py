"""How long does `paley generate` take from the start to its first token, and where does the time go?

Each folder is opened in new processes, on all cores and on one: seconds for the imports, for the tokenizer, for the
engine's opening, and to the first token of a short prompt. Medians of --rounds. Files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"


def once(folder: Path, one_core: bool) -> dict[str, float]:
    """In this process, which has imported nothing yet."""
    if one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.perf_counter()
    import paley
    from paley.model.folders import load_tokenizer
    from paley.pipeline.opening import open_text_model

    imported = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    tokenized = time.perf_counter()
    model = open_text_model(folder, tokenizer=tokenizer)
    opened = time.perf_counter()
    found = paley.generate(model, PROMPT, max_new_tokens=1)
    end = time.perf_counter()
    if found.engine != "native":
        raise SystemExit(f"{folder}: the engine does not run it: {found.reason}")
    return {
        "imports": imported - start, "tokenizer": tokenized - imported, "engine": opened - tokenized,
        "first_token": end - opened, "all_but_imports": end - imported,
    }  # fmt: skip


def medians(folder: Path, one_core: bool, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.start", str(folder), "--once", *(["--one-core"] if one_core else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if one_core else None
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        for _ in range(rounds)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="quantized folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="in this process; prints JSON")
    parser.add_argument("--one-core", action="store_true", help="with --once: on one core")
    parser.add_argument("--output", type=Path, help="default: bench/results/start.json")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.folders[0], args.one_core)))
        return
    from bench.record import RESULTS, provenance, save

    result: dict[str, Any] = provenance() | {"models": {}}
    for folder in args.folders:
        found = {name: medians(folder, one, args.rounds) for name, one in (("all_cores", False), ("one_core", True))}
        result["models"][folder.name] = found
        save(result, args.output or RESULTS / "start.json")
        print(folder.name, found, flush=True)


if __name__ == "__main__":
    main()
