"""What sharing by Ray costs beside two processes: writes bench/results/workers.json.

python -m bench.workers MODEL --text T --test-text T2 [--quantized OUT] [--only RE] [--kill N]
`paley sensitivity` and `paley eval` run with `--workers 2` and with `--ray --workers 2`, in turn, --pairs times.
Measured: seconds, the largest worker's memory beside the estimated, and that what they write is the same. --kill: in
one run more, so many of Ray's workers are ended by SIGKILL at drawn moments. Needs `pip install "paley[ray]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench.record import RESULTS, provenance, save

from paley.data import blocks_from_ids
from paley.model.loading import open_source
from paley.pipeline.worker_memory import of_scores, of_trials

WAYS = {"processes": ["--workers", "2"], "ray": ["--ray", "--workers", "2"]}
SIZES = {"sensitivity": (2, 256), "eval": (48, 512)}  # sequences, tokens of each


def workers_of(pid: int) -> dict[int, int]:
    """Process ids of what is at work under a process, and its bytes: processes that multiprocessing or Ray began."""
    found, waiting = {}, [pid]
    while waiting:
        for child in _children(waiting.pop()):
            waiting.append(child)
            command = Path(f"/proc/{child}/cmdline").read_bytes() if Path(f"/proc/{child}").exists() else b""
            if command.startswith(b"ray::") or b"spawn_main" in command:
                found[child] = _resident(child)
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run(arguments: list[str], kills: int = 0, life: float = 0) -> dict:
    """`paley ARGUMENTS`; kills: of workers, each at a drawn moment within `life` seconds of the last."""
    command = [sys.executable, "-c", "from paley_command import main; main()", *arguments]
    even = os.environ | {"RAY_worker_niceness": "0"}  # Ray's own is 15: others on the machine would go before it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=even)
    start, peak, draw, ended = time.time(), 0, random.Random(0), 0
    next_kill = start + 15 + draw.uniform(0, life)
    while process.poll() is None:
        at_work = workers_of(process.pid)
        peak = max([peak, *at_work.values()])
        if ended < kills and time.time() > next_kill and at_work:
            os.kill(draw.choice(sorted(at_work, key=lambda pid: -at_work[pid])[:2]), signal.SIGKILL)
            ended, next_kill = ended + 1, time.time() + draw.uniform(0.2, 1) * life
        time.sleep(0.05)
    seconds = time.time() - start
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors[-2000:])
    row = {"seconds": round(seconds, 1), "worker_peak_bytes": peak}
    return row | {"printed": output} | ({"killed": ended} if kills else {})


def estimate(verb: str, model: Path, sequences: int, seq_len: int) -> int:
    """What Paley takes a worker to need."""
    sites = open_source(model).sites
    blocks = blocks_from_ids(torch.ones(sequences, seq_len, dtype=torch.int64), "test", "some")
    if verb == "eval":
        return of_scores(sites, blocks, compared=True)
    return of_trials(sites, blocks, paged=True, own_head=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--test-text", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, help="what --preset made of it; for eval")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", default="", help="sensitivity or eval")
    parser.add_argument("--kill", type=int, default=0, help="so many of Ray's workers, in a run of its own")
    parser.add_argument("--life", type=float, default=20, help="longest time between two kills, in seconds")
    arguments = parser.parse_args()
    file = RESULTS / "workers.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    result |= provenance() | {"model": arguments.model.name}
    for verb, sizes in SIZES.items():
        if not re.search(arguments.only, verb) or (verb == "eval" and arguments.quantized is None):
            continue
        estimated = estimate(verb, arguments.model, *sizes)
        row = {"sequences": sizes[0], "seq_len": sizes[1], "estimated_bytes": estimated, "processes": [], "ray": []}
        seen = set[str]()
        sized = ["--sequences", str(sizes[0]), "--seq-len", str(sizes[1])]

        def command(way: str, verb: str = verb, sizes: list[str] = sized) -> tuple[list[str], Path]:
            output = arguments.model.parent / f".{way}-alpha.json"
            if verb == "eval":
                return [verb, str(arguments.quantized), "--against", str(arguments.model), "--data",
                        str(arguments.test_text), "--json", *sizes, *WAYS[way]], output  # fmt: skip
            return [verb, str(arguments.model), "--text", str(arguments.text), "--output", str(output), "--overwrite",
                    "--method", "noise", "--levels", "4", *sizes, *WAYS[way]], output  # fmt: skip

        def made(way: str, kills: int = 0, verb: str = verb, seen: set[str] = seen) -> dict:
            asked, output = command(way)
            found = run(asked, kills, arguments.life)
            printed = found.pop("printed")
            if verb == "eval":
                told = json.loads(printed)
                printed = json.dumps({k: v for k, v in told.items() if k not in ("seconds", "peak_memory_bytes")})
            else:
                printed = output.read_text()
                output.unlink()
            seen.add(printed)
            print(verb, way, found, flush=True)
            return found

        for pair in range(arguments.pairs):
            for way in WAYS if pair % 2 == 0 else reversed(WAYS):
                row[way].append(made(way))
        if arguments.kill:
            row["killed"] = made("ray", arguments.kill)
        medians = [statistics.median(found["seconds"] for found in row[way]) for way in WAYS]
        row |= {"ratio": round(medians[1] / medians[0], 3), "same": len(seen) == 1}
        result["rows"][f"{arguments.model.name} {verb}"] = row
        save(result, file)
        print(verb, {key: row[key] for key in ("ratio", "same")}, flush=True)
        if not row["same"]:
            raise SystemExit(f"{verb}: not the same")


if __name__ == "__main__":
    main()
