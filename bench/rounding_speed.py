"""How fast activations are transformed and rounded: the native kernel beside the torch code, whose bits it gives.

python -m bench.rounding_speed: widths of SmolLM2-135M (inputs of 576 and 1536 values, keys of 64), Qwen2.5-0.5B (896
and 4864) and Gemma-3-270m (640, 2048; keys of 256); writes bench/results/rounding-speed.json. Milliseconds, the median
of repetitions in turns, for many tokens and for one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench.record import RESULTS, provenance, save

from paley.core.schemes import ActivationScheme
from paley.model.rotation import input_blocks
from paley.ops.rounding import round_trip

OUT = RESULTS / "rounding-speed.json"
BLOCK = 1024  # largest Hadamard blocks, as in presets
WIDTHS = (576, 1536, 896, 4864, 640, 2048)
SCHEMES = {
    "uint4": ActivationScheme("uint4", clip_ratio=0.95),
    "gauss4": ActivationScheme("gauss4", "rms"),
    "uint3, groups": ActivationScheme("uint3", group_size=32),
}


def milliseconds(run: Callable[[], object], repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"native": [], "reference": []}
    for _ in range(repetitions):
        for backend, taken in times.items():
            os.environ["PALEY_BACKEND"] = backend
            run()  # caches are warm
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
    return {backend: round(statistics.median(taken), 4) for backend, taken in times.items()}


def case(shape: tuple[int, ...], name: str, scale_dtype: torch.dtype, repetitions: int) -> dict:
    x, width = torch.randn(shape), shape[-1]
    transform = input_blocks(width, BLOCK, seed=1)
    ms = milliseconds(lambda: round_trip(x, SCHEMES[name], scale_dtype, transform=transform), repetitions)
    print(f"{list(shape)}, {name}, blocks of {transform.order}: {ms['native']:.3f} ms, torch {ms['reference']:.3f}")
    return {"shape": list(shape), "rounding": name, "order": transform.order, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        inputs = [(tokens, width) for width in WIDTHS for tokens in (2048, 1)]
        results = [case(shape, name, torch.float32, args.repetitions) for shape in inputs for name in SCHEMES]
        keys = ((8, 3, 512, 64), (8, 1, 512, 256))
        results += [case(shape, "uint4", torch.float16, args.repetitions) for shape in keys]
    save({**provenance(), "results": results}, args.output)


if __name__ == "__main__":
    main()
