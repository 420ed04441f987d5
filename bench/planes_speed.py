"""How fast two-bit weights meet four-bit inputs: the native paths beside torch's products of the same shape.

python -m bench.planes_speed: the three shapes of a 7B LLaMA's layers, groups of 128 columns; writes
bench/results/planes-speed.json. Milliseconds, the median and the best of repetitions in turns; each takes the next
of several copies of its weight, 128 MB of them at least, so that weights come from memory as in a model.

What differs: Paley's inputs and those of torch's _int_mm are codes already; torch's dynamic int8 layer rounds them
itself, with one scale for all; its int4 weights (4.25 bits, Paley's 2.5) meet bfloat16 inputs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from bench.record import RESULTS, provenance, save
from torch import Tensor

from paley.core import planes
from paley.kernels import native

OUT = Path(__file__).parent / "results" / "planes-speed.json"
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # out, columns
GROUP_SIZE = 128
WORKING_SET = 2**27  # bytes: what no cache here holds

Run = Callable[[], object]
Contender = tuple[int, Run]  # bytes of one weight, and a product with the next copy


def copies(make: Callable[[], object], size: int, multiply: Callable[..., object]) -> Contender:
    """`multiply` takes what `make` gives, of `size` bytes; each call another copy."""
    turn = itertools.cycle([make() for _ in range(-(-WORKING_SET // size))])
    return size, lambda: multiply(next(turn))


def native_paths(x: tuple[Tensor, ...], codes: Tensor, centroids: Tensor, threads: int) -> dict[str, Contender]:
    blob = native.pack_planes(codes, centroids)
    half = centroids[..., :2]
    mirrored = native.pack_planes(codes, torch.cat([half, -half.flip(-1)], -1))

    def path(name: str, weight: Tensor = blob) -> Contender:
        return copies(
            weight.clone, len(weight), lambda w: native.planes_matmul(*x, w, len(codes), path=name, threads=threads)
        )

    return {
        "popcount": path("popcount"),
        "dots": path("dots"),
        "tables": path("tables"),
        "tables, mirrored centroids": path("tables", mirrored),
        "popcount, mirrored centroids": path("popcount", mirrored),
    }


def torch_products(tokens: int, out: int, n: int) -> dict[str, Contender]:
    """Dense weights in float32 and bfloat16, and torch's integer products."""
    x, weight = torch.randn(tokens, n), torch.randn(out, n)
    x_half, half = x.bfloat16(), weight.bfloat16()
    x_bytes = torch.randint(-8, 8, (tokens, n), dtype=torch.int8)
    scales = torch.ones(n // GROUP_SIZE, out, 2, dtype=torch.bfloat16)
    int8 = weight.to(torch.int8)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (out, n), dtype=torch.int32), 1)

    def dynamic() -> torch.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the layer old
            layer = torch.nn.Sequential(torch.nn.Linear(n, out, bias=False))
            return torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)

    linear = torch.nn.functional.linear
    return {
        "torch float32": copies(weight.clone, 4 * out * n, lambda w: linear(x, w)),
        "torch bfloat16": copies(half.clone, 2 * out * n, lambda w: linear(x_half, w)),
        "torch int8 dynamic": copies(dynamic, out * n, lambda layer: layer(x)),
        "torch int8 _int_mm": copies(int8.clone, out * n, lambda w: torch._int_mm(x_bytes, w.T)),
        "torch int4 weight": copies(
            int4.clone,
            out * n // 2 + 2 * scales.numel(),
            lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x_half, w, GROUP_SIZE, scales),
        ),
    }


def medians(contenders: dict[str, Contender], seconds: float) -> dict[str, dict[str, float]]:
    """Each in turn until `seconds` are over, five times at least."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _, run in contenders.values():
        run()
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
        for name, (_, run) in contenders.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    result = {}
    for name, (size, _) in contenders.items():
        median = sorted(times[name])[rounds // 2]
        result[name] = {
            "ms": round(1e3 * median, 3),
            "best_ms": round(1e3 * min(times[name]), 3),
            "GB/s of weights": round(size / median / 1e9, 2),
        }
    return result


def measure(out: int, n: int, tokens: int, threads: int, seconds: float) -> dict:
    g = torch.Generator().manual_seed(0)
    groups = n // GROUP_SIZE
    codes = torch.randint(0, 4, (out, n), generator=g, dtype=torch.uint8)
    centroids = torch.randn(out, groups, 4, generator=g).half()
    x = (
        torch.randint(0, 16, (tokens, n), generator=g, dtype=torch.uint8),
        torch.rand(tokens, groups, generator=g),
        torch.randint(0, 16, (tokens, groups), generator=g, dtype=torch.uint8),
    )
    torch.set_num_threads(threads)
    blob, expected = native.pack_planes(codes, centroids), planes.reference(*x, codes, centroids, out)
    for path in native.PATHS:
        y = native.planes_matmul(*x, blob, out, path=path)
        assert (y - expected).norm() < 1e-5 * expected.norm()
    rows = medians(native_paths(x, codes, centroids, threads) | torch_products(tokens, out, n), seconds)
    ratios = {
        f"{kind} / tables": {name: round(row[kind] / rows["tables"][kind], 2) for name, row in rows.items()}
        for kind in ("ms", "best_ms")  # the best is what other work on the machine disturbs least
    }
    return {**rows, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each table")
    arguments = parser.parse_args()
    result = {
        **provenance(),
        "threads": arguments.threads,
        "level": native.best_planes_level(),
        "group_size": GROUP_SIZE,
        "load_average_before": os.getloadavg()[0],
        "results": {},
    }
    for (out, n), tokens, threads in itertools.product(SHAPES, arguments.tokens, arguments.threads):
        name = f"{out}x{n}, {tokens} tokens, {threads} threads"
        result["results"][name] = measure(out, n, tokens, threads, arguments.seconds)
        print(name, {k: [r["ms"], r["best_ms"]] for k, r in result["results"][name].items() if "ms" in r}, flush=True)
    save(result, RESULTS / "planes-speed.json")


if __name__ == "__main__":
    main()
