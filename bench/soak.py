"""Does the engine's memory stay flat? Thousands of tokens, one by one, by two engines of one process in turns.

Each folder is opened twice. Both engines continue the same prompt greedily until a context is full, and begin again in
a new one: every round must give the same tokens as the first. In between, prompts are read several at a time, and
contexts are cut short. After each round the process's resident memory is noted. The script fails if it grew by more
than --slack in the second half of the rounds, or if a token differs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from bench.record import RESULTS, provenance, save

from paley.runtime import Engine

PROMPT = 33  # tokens: more than a block of attention, less than a page
WARM = 0.5  # share of the rounds after which memory must not grow: until then texts of all sizes have come


def resident() -> int:
    """Bytes of this process that are in memory, without mapped files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def round_of(engines: list[Engine], length: int, seed: int) -> list[int]:
    """One text of `length` tokens by each engine -> the tokens, which must agree."""
    vocabulary = engines[0].vocabulary
    prompt = [(7 * i) % (vocabulary - 5) + 5 for i in range(PROMPT)]
    contexts = [engine.start() for engine in engines]
    rows = [engine.read([(context, prompt)]) for engine, context in zip(engines, contexts, strict=True)]
    tokens: list[int] = []
    for at in range(length - PROMPT):
        chosen = [int(torch.argmax(row[0])) for row in rows]
        if len(set(chosen)) > 1:
            raise SystemExit(f"the engines differ at token {at}: {chosen}")
        tokens.append(chosen[0])
        rows = [engine.read([(c, [chosen[0]])]) for engine, c in zip(engines, contexts, strict=True)]
    for engine, context in zip(engines, contexts, strict=True):  # other texts come and go, in sizes that change
        others = [engine.start() for _ in range(1 + seed % 4)]
        engine.read([(other, prompt[: 1 + (seed + i) % 17]) for i, other in enumerate(others)])
        context.truncate(length // 2)
        engine.read([(context, [5]), (others[0], prompt[:2])])
        for each in (context, *others):
            each.close()
    return tokens


def soak(folder: Path, tokens: int, context: int, threads: int, slack: int) -> dict[str, Any]:
    """At least `tokens` generated tokens by both engines together."""
    engines = [Engine.open(folder, threads=threads) for _ in range(2)]
    length = min(context, engines[0].limit or context)
    rounds = max(10, -(-tokens // (2 * (length - PROMPT))))
    first, samples, start = None, [], time.perf_counter()
    for number in range(rounds):
        found = round_of(engines, length, number)
        first = first or found
        if found != first:
            raise SystemExit(f"{folder.name}: round {number} differs from the first one")
        samples.append(resident())
        print(f"{folder.name}: round {number + 1} of {rounds}, {samples[-1] / 2**20:.2f} MB", flush=True)
    seconds = time.perf_counter() - start
    for engine in engines:
        engine.close()
    settled = samples[int(WARM * rounds) :]
    growth = max(settled) - settled[0]
    return {
        "tokens": 2 * rounds * (length - PROMPT), "context": length, "rounds": rounds, "engines": 2,
        "threads_of_each": threads, "seconds": seconds, "resident_bytes": samples, "growth_bytes": growth,
        "slack_bytes": slack, "flat": growth <= slack,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="quantized folders")
    parser.add_argument("--tokens", type=int, default=10_000, help="to generate with each folder")
    parser.add_argument("--context", type=int, default=256, help="tokens of a text, at most")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--slack", type=int, default=2**18, help="bytes that memory may grow by")
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args()
    result: dict[str, Any] = provenance() | {"models": {}}
    for folder in args.folders:
        result["models"][folder.name] = soak(folder, args.tokens, args.context, args.threads, args.slack)
        save(result, args.output)
    if grown := [name for name, found in result["models"].items() if not found["flat"]]:
        raise SystemExit(f"memory grows: {', '.join(grown)}")


if __name__ == "__main__":
    main()
