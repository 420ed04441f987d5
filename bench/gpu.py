"""How fast are Triton's grid_matmul and kv_attention on a GPU, beside bfloat16?

Products: random weights of --shapes in each grid, for 1 to 64 tokens, beside torch's product in bfloat16. Attention:
one token after so many others, the cache in 4 and 2 bits, beside torch's with a bfloat16 cache. Times are medians of
calls in turns, each between two events, with the caches of the GPU overwritten before each. `error` is that of the
result relative to the decoded weight or cache, so that a fast wrong number shows. For comparison, FLUTE and Marlin
publish 2 to 3 times the speed of 16 bits, at 4 bits and small batches.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.record import RESULTS, provenance, save
from torch import Tensor

from paley.core import grids, packing
from paley.core.grids import Grid
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme
from paley.kernels import gpu
from paley.kernels.stored import StoredWeight
from paley.ops.attention import pack_kv

GRIDS = "gauss2,gauss3,gauss4,uint4,p2n16,p2n64,p2n256"
TOKENS = (1, 2, 4, 8, 16, 32, 64)


def seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MB: more than any second-level cache
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, call in calls.items():
            flushed.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                found[name].append(begin.elapsed_time(end) / 1000)
    return {name: statistics.median(times) for name, times in found.items()}


def weight_of(name: str, rows: int, width: int, group: int) -> Quantized:
    grid = grids.load(name)
    assert isinstance(grid, Grid)
    g = torch.Generator(device="cuda").manual_seed(0)
    codes = torch.randint(grid.size, (rows, width // grid.p), generator=g, device="cuda").to(grid.code_dtype)
    scales = (torch.rand(rows, width // group, generator=g, device="cuda") + 0.5).half()
    zeros = torch.randint(grid.size, scales.shape, generator=g, device="cuda").byte() if grid.affine else None
    return Quantized(codes, scales, zeros, grid, width)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def product(name: str, rows: int, width: int, group: int, rounds: int) -> list[dict[str, Any]]:
    from paley.kernels.gpu.matmul import matmul, prepare

    q = weight_of(name, rows, width, group)
    stored = StoredWeight(name, packing.pack_codes(q.codes, q.grid.size), q.scales, q.zeros, q.grid, width)
    matrix, dense = prepare(stored), q.dequantize().bfloat16()
    size = sum(t.nbytes for t in (stored.codes, q.scales, q.zeros) if t is not None)
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        times = seconds({"triton": lambda x=x: matmul(x, matrix), "bfloat16": lambda x=x: x @ dense.T}, rounds)
        found.append({
            "grid": name, "rows": rows, "width": width, "group": group, "tokens": tokens, **times,
            "ratio": times["bfloat16"] / times["triton"], "bytes_per_second": size / times["triton"],
            "error": error(matmul(x, matrix), x.float() @ q.dequantize().T),
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def attention(bits: int, tokens: int, heads: int, kv_heads: int, size: int, rounds: int) -> dict[str, Any]:
    from paley.kernels.gpu.attention import attention as kernel

    scheme = ActivationScheme(f"uint{bits}", group_size=min(64, size))
    k, v = (torch.randn(1, kv_heads, tokens, size, device="cuda") for _ in range(2))
    packed = [pack_kv(x, scheme) for x in (k, v)]
    plain = [x.bfloat16() for x in (k, v)]
    q, scaling = torch.randn(1, heads, 1, size, device="cuda", dtype=torch.bfloat16), size**-0.5
    sdpa = torch.nn.functional.scaled_dot_product_attention
    times = seconds({
        "triton": lambda: kernel(q, *packed, None, scaling),
        "bfloat16": lambda: sdpa(q, *plain, scale=scaling, enable_gqa=True),
    }, rounds)  # fmt: skip
    wanted = sdpa(q.float(), *(side.dequantize() for side in packed), scale=scaling, enable_gqa=True)
    found = {
        "bits": bits, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "size": size, **times,
        "ratio": times["bfloat16"] / times["triton"], "cache_bytes": sum(side.nbytes for side in packed),
        "error": error(kernel(q, *packed, None, scaling), wanted),
    }  # fmt: skip
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grids", default=GRIDS)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="rows x columns")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale")
    parser.add_argument("--contexts", default="1024,8192,32768", help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    if (reason := gpu.why_not()) is not None or gpu.interpreted():
        raise SystemExit(f"no kernel can be measured here: {reason or 'TRITON_INTERPRET=1 is set'}")
    result: dict[str, Any] = provenance() | {"gpu": torch.cuda.get_device_name(), "products": [], "attention": []}
    for name in args.grids.split(","):
        for shape in args.shapes.split(","):
            rows, width = map(int, shape.split("x"))
            result["products"] += product(name, rows, width, math.gcd(args.group, width), args.rounds)
            save(result, args.output)
    for bits in (4, 2):
        for tokens in map(int, args.contexts.split(",")):
            result["attention"].append(attention(bits, tokens, 32, 8, 128, args.rounds))
            save(result, args.output)


if __name__ == "__main__":
    main()
