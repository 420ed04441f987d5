"""`paley.doctor`: what this machine and this installation can do, and what a model gets of it."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from paley import kernels
from paley.core import grids, nearest
from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.kernels import gpu, matmul, native
from paley.kernels import rounding as rounding_kernels
from paley.model.folders import resolve
from paley.pipeline.any_model import is_paley
from paley.pipeline.machine import free_memory
from paley.pipeline.opening import why_no_engine
from paley.runtime import Engine

__all__ = ["Doctor", "doctor"]

_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm",
)  # fmt: skip


@dataclass(frozen=True)
class Doctor:
    """library: the native one's file; missing: why it is not used. tests: of its kernels, "ok" or what failed.

    gpu: the Triton kernels, whether they are taken, or why there are none. engine: None without a folder, else
    "native", or why the engine does not run it. products: product -> linears.
    """

    machine: str
    cores: int
    threads: int
    free_memory: int | None
    instructions: tuple[str, ...]
    versions: dict[str, str]
    library: str
    missing: str | None
    levels: dict[str, str]
    tests: dict[str, str]
    seconds: float
    gpu: str
    engine: str | None = None
    products: dict[str, int] | None = None

    @property
    def well(self) -> bool:
        """Whether the native library is there and every test passed."""
        return self.missing is None and all(result == "ok" for result in self.tests.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"well": self.well}


def doctor(folder: str | Path | None = None) -> Doctor:
    """Looks at machine and installation, and tests the kernels for a second; with a folder, at what its layers get."""
    start, missing = time.perf_counter(), native.why_missing()
    if missing is None and kernels.backend() == "reference":
        missing = "PALEY_BACKEND=reference"
    levels, tests = {}, {}
    if missing is None:
        levels = {"rounding": native.best_level(), "planes": native.best_planes_level(), "matmul": matmul.best_level()}
        tests = {name: _outcome(test) for name, test in _TESTS.items()}
    engine, products = None, None
    if folder is not None:
        path = resolve(str(folder))
        engine = why_no_engine(path) if is_paley(path) else "the model is not quantized by Paley"
        if engine is None:
            opened = Engine.open(path)
            engine, products = "native", dict(Counter(opened.program.products.values()))
            opened.close()
    return Doctor(
        machine=_machine(), cores=os.cpu_count() or 1, threads=torch.get_num_threads(), free_memory=free_memory(),
        instructions=_instructions(), library=str(native.LIBRARY), missing=missing, levels=levels, tests=tests,
        versions={
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        seconds=time.perf_counter() - start, gpu=_gpu(), engine=engine, products=products,
    )  # fmt: skip


def _gpu() -> str:
    if (reason := gpu.why_not()) is not None:
        return f"none: {reason}"
    if gpu.interpreted():
        return "Triton's interpreter, on the CPU (TRITON_INTERPRET=1)"
    name = torch.cuda.get_device_name()
    if gpu.chosen(torch.device("cuda")):
        return f"grid_matmul and kv_attention on {name} (PALEY_TRITON=1)"
    return f"grid_matmul and kv_attention for {name}, off: they were not measured yet; PALEY_TRITON=1 takes them"


def _cpuinfo(key: str) -> str:
    """The first entry of that name; "" on other systems than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _machine() -> str:
    return f"{_cpuinfo('model name') or platform.processor() or 'unknown processor'}, {platform.machine()}"


def _instructions() -> tuple[str, ...]:
    found = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return tuple(flag for flag in _FLAGS if flag in found)


def _outcome(test: Any) -> str:
    try:
        return "ok" if test(torch.Generator().manual_seed(0)) else "gives wrong numbers"
    except Exception as error:  # whatever it is, the others are tested too
        return f"fails: {error}"


def _rounds(generator: torch.Generator) -> bool:
    x = torch.randn(33, 96, generator=generator)
    transform = Transform(96, 96, 32, 0)
    return torch.equal(rounding_kernels.round_trip(x, None, transform=transform), transform.apply(x))


def _finds(generator: torch.Generator) -> bool:
    x, points = torch.randn(500, 2, generator=generator), grids.load("p2n64").points.float()  # type: ignore[union-attr]
    return torch.equal(native.nearest_points(x, points), nearest.reference(x, points).int())


def _multiplies(generator: torch.Generator) -> bool:
    """On every level of the machine alike, and as the weight written out to a hundredth."""
    scheme = LinearScheme(WeightScheme("gauss4", 32, "nearest", "rms"))
    codes = torch.randint(16, (50, 96), generator=generator).to(torch.uint8)
    q = Quantized(codes, torch.rand(50, 3, generator=generator).half() + 0.5, None, "gauss4", 96)
    x = torch.randn(5, 96, generator=generator)
    matrix = matmul.prepare(q, scheme)
    inputs = matmul.encode(x, matrix)
    found = [matmul.matmul(inputs, len(x), matrix, level=level) for level in matmul.levels()]
    wanted = x @ q.dequantize().T
    close = float((found[0] - wanted).norm() / wanted.norm()) < 1e-2
    return close and all(torch.equal(each, found[0]) for each in found)


_TESTS = {"rounding": _rounds, "nearest points": _finds, "products in integers": _multiplies}
