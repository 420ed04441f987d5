"""How fast weights become codes: Paley's native kernel and its torch reference, and peers' quantizers beside them.

python benchmarks/nearest_speed.py: one matrix of N(0, 1), 4096 x 4096; writes benchmarks/results/nearest-speed.json.
Millions of weights a second, the best of several runs: by the clock, and by a second of processor time, which other
work on the machine disturbs less; ratios are of the latter. Peers are measured where they are installed (hqq with
termcolor, einops and accelerate; gguf), each with its own quantizer: another grid and other work, such as hqq's
optimised zero points, but the same matrix and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from paley.core import nearest
from paley.kernels import native

OUT = Path(__file__).parent / "results" / "nearest-speed.json"
SIZES = [(1, 16), (2, 16), (2, 256), (3, 512), (4, 256), (4, 4096)]
ROWS = COLUMNS = 4096


def provenance() -> dict:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    changes = git("status", "--porcelain", "--", "../src/paley/kernels", "../src/paley/core/nearest.py", "../csrc")
    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if changes else ""),
        "machine": f"{platform.machine()}, {native.best_level()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "unit": "million weights a second: [by the clock, by processor time]",
        "load_average_before": os.getloadavg()[0],
    }


Speed = list[float]  # by the clock, by processor time


def speed(run: Callable[[], object], weights: int, seconds: float = 2.0) -> Speed:
    """Millions of weights a second in the best of the runs that fit in `seconds`, at least two."""
    clocks = (time.perf_counter, time.process_time)
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < seconds:
        before = [clock() for clock in clocks]
        run()
        times.append([clock() - b for clock, b in zip(clocks, before, strict=True)])
    return [round(weights / min(column) / 1e6, 2) for column in zip(*times, strict=True)]


def gaussian_points(p: int, n: int) -> Tensor:
    """A grid for N(0, I_p) by a few steps of Lloyd's iteration: as hard to search as the best one."""
    g = torch.Generator().manual_seed(n)
    points = torch.randn(n, p, generator=g) * ((p + 2) / p) ** 0.5
    x = torch.randn(40 * n, p, generator=g)
    for _ in range(10):
        codes = native.nearest_points(x, points).long()
        count = torch.bincount(codes, minlength=n)[:, None]
        total = torch.zeros(n, p).index_add_(0, codes, x)
        points = torch.where(count > 0, total / count.clamp(min=1), points)
    return points


def ours(weight: Tensor, p: int, n: int, threads: int) -> dict[str, Speed]:
    points = gaussian_points(p, n)
    x = weight.flatten()[: weight.numel() // p * p].view(-1, p)
    few = x[: 2**26 // n]  # the reference takes its time
    torch.set_num_threads(threads)
    assert torch.equal(nearest.reference(few, points), native.nearest_points(few, points))
    return {
        "native": speed(lambda: native.nearest_points(x, points, threads=threads), x.numel()),
        "reference": speed(lambda: nearest.reference(few, points), few.numel()),
    }


def hqq(weight: Tensor) -> dict[str, Callable[[], object]]:
    from hqq.core.quantize import Quantizer

    def run(bits: int, optimize: bool) -> Callable[[], object]:
        settings = {"group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        return lambda: Quantizer.quantize(weight, nbits=bits, optimize=optimize, **settings)

    return {"hqq 4-bit g64": run(4, True), "hqq 4-bit g64, not optimised": run(4, False)}


def gguf(weight: Tensor) -> dict[str, Callable[[], object]]:
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    array = weight.numpy()
    return {
        f"gguf (numpy) {kind.name}": lambda kind=kind: quants.quantize(array, kind) for kind in (Kind.Q4_0, Kind.Q8_0)
    }


def peers(weight: Tensor, threads: int) -> dict[str, Speed | str]:
    """Speeds by name, or why there is none."""
    torch.set_num_threads(threads)
    found: dict[str, Speed | str] = {}
    for make in (hqq, gguf):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs = make(weight)
        except ImportError as error:
            found[make.__name__] = f"absent: {error}"
            continue
        found |= {name: speed(run, weight.numel()) for name, run in runs.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    threads = parser.parse_args().threads
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    result = {**provenance(), "threads": {}}
    for count in threads:
        rows = {}
        for p, n in SIZES:
            speeds = ours(weight, p, n, count)
            ratio = round(speeds["native"][1] / speeds["reference"][1], 1)
            rows[f"p={p} n={n}"] = {**speeds, "native / reference": ratio}
            print(f"{count} threads  p={p} n={n}: {rows[f'p={p} n={n}']}", flush=True)
        others = peers(weight, count)
        print(f"{count} threads  {others}", flush=True)
        main_size = rows["p=2 n=256"]["native"][1]
        ratios = {name: round(main_size / s[1], 1) for name, s in others.items() if not isinstance(s, str)}
        result["threads"][str(count)] = {"paley": rows, "peers": others, "p=2 n=256 native / peer": ratios}
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
