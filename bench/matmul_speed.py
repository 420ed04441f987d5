"""How fast `csrc/matmul*` multiplies, on one core: weights and bytes a second of each kind, level and number of rows.

Beside it, in the same run: how fast memory is read, and torch's float32 and bfloat16 linear. Times are processor times
of the calling thread, so that other jobs on the machine matter little; the least of some runs. A decode step reads
weights that are in no cache: copies of the matrix take turns until they are larger than the last cache.

    python -m bench.matmul_speed [--out bench/results/matmul-speed.json] [--levels avx2] [--mb 256]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench.record import provenance, save
from torch import Tensor
from torch.nn.functional import linear

from paley.core import grids
from paley.core.rounding import Quantized, codes_per_row
from paley.core.schemes import LinearScheme, WeightScheme
from paley.kernels import matmul

GRIDS = {
    2: ["gauss2", "p2n16", "p4n256", "free2", "trellis2"], 2.5: ["trellis2.5"],
    3: ["gauss3", "p2n64", "p3n512", "p4n4096", "trellis3"], 3.5: ["trellis3.5"],
    4: ["gauss4", "uint4", "p2n256", "trellis4"], 5: ["trellis5"], 6: ["p2n4096", "int6", "p1n64", "trellis6"],
    8: ["int8", "gauss8"],
}  # fmt: skip
OUT, WIDTH, GROUP = 2048, 2048, 1024  # as in models of a billion parameters


def seconds(run: Callable[[], object], least: float = 0.2) -> float:
    """Of the thread's processor time, for one run."""
    run()
    best, spent = math.inf, 0.0
    while spent < least:
        start = time.thread_time()
        run()
        took = time.thread_time() - start
        best, spent = min(best, took), spent + took
    return best


def matrix_of(name: str) -> matmul.PreparedMatrix:
    grid = grids.load(name)
    group = GROUP if WIDTH % (GROUP * grid.p) == 0 and GROUP % grid.p == 0 else None
    if grid.free:
        group = 128
    scale = "em" if grid.free else "rms" if grid.p > 1 or grid.sequential else "absmax"
    width = WIDTH // 3 // 16 * 48 if grid.p == 3 else WIDTH
    scheme = LinearScheme(WeightScheme(grid, group, "nearest", scale))
    groups = width // (group or width)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(grid.size, (OUT, codes_per_row(width, grid.p)), generator=g).to(grid.code_dtype)
    scales = torch.rand(OUT, groups, *grid.scale_shape, generator=g).sort(-1).values.add(0.5).half()
    zeros = torch.randint(grid.size, (OUT, groups), generator=g).byte() if grid.affine else None
    return matmul.prepare(Quantized(codes, scales, zeros, grid, width), scheme)


def copies(matrix: matmul.PreparedMatrix, size: int) -> list[matmul.PreparedMatrix]:
    made = [matrix]
    while len(made) * len(matrix.blob) < size:
        blob = matmul.aligned(len(matrix.blob))
        blob.copy_(matrix.blob)
        made.append(matmul.PreparedMatrix(matrix.plan, blob, matrix.out, matrix.width))
    return made


def read_rate(size: int) -> float:
    """Bytes a second of a sum over int64 numbers, whose arithmetic costs nothing beside the reading."""
    numbers = torch.ones(size // 8, dtype=torch.int64)
    return size / seconds(lambda: numbers.sum(), 0.5)


def ours(name: str, level: str, rows: int, size: int) -> dict[str, float]:
    """Gigaweights a second and so on."""
    matrices = copies(matrix_of(name), size if rows == 1 else 1)
    x = torch.randn(rows, matrices[0].width)
    inputs = matmul.encode(x, matrices[0], threads=1)

    def run() -> None:
        for matrix in matrices:
            matmul.matmul(inputs, rows, matrix, level=level, threads=1)

    took = seconds(run) / len(matrices)
    weights = OUT * matrices[0].width
    return {
        "weights_per_s": rows * weights / took / 1e9, "gb_per_s": len(matrices[0].blob) / took / 1e9,
        "bits": 8 * len(matrices[0].blob) / weights, "us": 1e6 * took,
    }  # fmt: skip


def torch_rate(dtype: torch.dtype, rows: int, size: int) -> float:
    weight = torch.randn(OUT, WIDTH).to(dtype)
    weights: list[Tensor] = [weight.clone() for _ in range(max(1, size // weight.nbytes) if rows == 1 else 1)]
    x = torch.randn(rows, WIDTH).to(dtype)

    def run() -> None:
        for weight in weights:
            linear(x, weight)

    return rows * OUT * WIDTH * len(weights) / seconds(run) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--levels", nargs="+", default=[matmul.best_level()])
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--grids", nargs="+", default=[name for names in GRIDS.values() for name in names])
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.mb * 2**20
    record: dict = provenance() | {"out": OUT, "width": WIDTH, "unit": "1e9 products a second, one core"}
    record["read_gb_per_s"] = [read_rate(size) / 1e9]
    for dtype in (torch.float32, torch.bfloat16):
        record[str(dtype)] = {rows: torch_rate(dtype, rows, size) for rows in (1, 4, 16, 512)}
        print(dtype, record[str(dtype)], flush=True)
    for level in options.levels:
        for bits, names in GRIDS.items():
            for name in (name for name in names if name in options.grids):
                plan = matrix_of(name).plan
                found = {rows: ours(name, level, rows, size) for rows in (1, 4, 16, 512)}
                record.setdefault(level, {})[name] = {"kind": plan.kind, "fine": plan.fine, "bits": bits, "rows": found}
                speeds = " ".join(f"{rows}: {r['weights_per_s']:6.1f}" for rows, r in found.items())
                one = found[1]
                rate = f"{one['bits']:5.2f} bits, {one['gb_per_s']:5.1f} GB/s"
                print(f"{level} {name:8} {plan.kind:7} {rate}, G products/s {speeds}", flush=True)
        record["read_gb_per_s"].append(read_rate(size) / 1e9)
    print("read, GB/s", record["read_gb_per_s"])
    if options.out:
        save(record, options.out)


if __name__ == "__main__":
    main()
