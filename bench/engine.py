"""How fast does the engine decode, beside its rivals, beside a busy process, and in a long context?

Each folder of Paley's is measured by `paley.bench`, rivals in the same rounds. Then tokens a second are counted with
and without another process that keeps a core busy, in turns. --context: the seconds of a token after so many others.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.record import RESULTS, provenance, save

import paley
from paley.runtime import Engine

NEW = 40  # tokens of a measurement


def speed(engine: Engine, context: Any) -> float:
    """Tokens a second, one by one."""
    length, start = context.length, time.perf_counter()
    for i in range(NEW):
        engine.read([(context, [i + 5])])
    seconds = time.perf_counter() - start
    context.truncate(length)
    return NEW / seconds


def beside_a_busy_process(engine: Engine, rounds: int) -> dict[str, float]:
    """Medians of rounds in turns, and their ratio; of two cores, three busy threads leave the engine two thirds."""
    context, alone, beside = engine.start(), [], []
    engine.read([(context, list(range(5, 100)))])
    for _ in range(rounds):
        alone.append(speed(engine, context))
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.2)
            beside.append(speed(engine, context))
        finally:
            busy.kill()
            busy.wait()
    found = {"alone": statistics.median(alone), "beside_a_busy_process": statistics.median(beside)}
    return found | {"share": found["beside_a_busy_process"] / found["alone"]}


def in_a_long_context(engine: Engine, tokens: int) -> dict[str, float]:
    """Tokens a second after `tokens` others, and the cache's bytes."""
    context = engine.start()
    for at in range(0, tokens, 512):
        engine.read([(context, [(7 * i) % 1000 + 5 for i in range(at, min(at + 512, tokens))])])
    return {"tokens": tokens, "tokens_per_second": speed(engine, context), "cache_bytes": context.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="quantized folders")
    parser.add_argument("--against", default="", help="rivals of paley.bench")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()
    result: dict[str, Any] = provenance() | {"models": {}}
    for folder in args.folders:
        against = [name for name in args.against.split(",") if name]
        found = paley.bench(folder, against=against, gguf=args.gguf, rounds=args.rounds).to_dict()
        start = time.perf_counter()
        engine = Engine.open(folder)
        found["opening_seconds"] = time.perf_counter() - start
        found["busy"] = beside_a_busy_process(engine, args.rounds)
        if args.context:
            found["long"] = in_a_long_context(engine, args.context)
        result["models"][folder.name] = found | {"folder": folder.name}
        save(result, args.output)
        print(folder.name, found, flush=True)


if __name__ == "__main__":
    main()
