"""How fast weights become codes, and at what error: Paley beside llama.cpp's quantizers, hqq and gguf, in one run.

python -m bench.nearest_speed: writes bench/results/nearest-speed.json. Every speed is a median of rounds in
which all candidates take turns, in millions of weights by the clock and by a second of processor time. The latter is
what one thread needs where other work shares the machine; ratios are of it.

`quantizers`: one thread, float32 weights of N(0, 1), 1024 x 4096, to everything that would be stored. Ours rotate in
float64, scale, round, check and pack as `paley quantize` does; parts of that are timed by themselves. With each, the
bits and bytes that it stores, its ||W - W'||^2 / ||W||^2 there and on real weights (the demo model's six down_proj, 768
of their 896 columns, as llama.cpp's blocks have 256). Some peers weigh errors by other rules, by default or by design;
llama.cpp's importances of 1 stand for a matrix that knows nothing, which a few of its types demand.
`threads`: the native kernel and its torch reference alone.

Peers are measured where they are: hqq (with termcolor, einops, accelerate) and gguf installed, and llama.cpp's library
ggml-base named by GGML_LIBRARY. Any build of llama.cpp has one, if with no more than the compiler's plain instruction
set; to build it alone for this machine, in the folder ggml of llama.cpp (or of `pip download llama-cpp-python
--no-binary :all: --no-deps`, vendor/llama.cpp/ggml), with src/ggml-version.h saying
`#define GGML_VERSION "x.y.z"` and `#define GGML_COMMIT "hash"`:

gcc -O3 -march=native -DNDEBUG -D_GNU_SOURCE -fPIC -shared -Iinclude -Isrc src/ggml*.c src/ggml-threading.cpp \
    src/ggml-backend.cpp src/ggml-backend-meta.cpp -lstdc++ -lm -o libggml-base.so
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench import record
from safetensors import safe_open
from torch import Tensor

from paley.core import nearest
from paley.core.metrics import rel_error
from paley.core.schemes import WeightScheme
from paley.core.transforms import Transform
from paley.format import spec
from paley.kernels import native
from paley.methods.nearest import quantize_nearest
from paley.model.rotation import input_blocks

SIZES = [(1, 16), (2, 16), (2, 256), (3, 512), (4, 256), (4, 4096)]
ROWS, COLUMNS = 1024, 4096
HADAMARD = 1024  # of the presets higgs-*
CHUNK = 2**20  # values that `paley quantize` rounds together
ROUNDS, SAMPLE = 5, 0.1  # a sample lasts so many seconds of processor time at least
GGML = {
    "Q4_0": 2, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20,
    "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip

Speed = list[float]  # millions of weights a second: by the clock, by processor time
Run = Callable[[], object]


def provenance() -> dict:
    return record.provenance() | {
        "level": native.best_level(),
        "unit": "million weights a second: [by the clock, by processor time], medians",
        "load_average_before": os.getloadavg()[0],
    }


def in_turns(runs: dict[str, tuple[int, Run]]) -> dict[str, Speed]:
    """runs: name -> (weights, what to time) -> the median speed of each; short runs are repeated within a sample."""
    repeats, samples = {}, {name: [] for name in runs}
    for name, (_, run) in runs.items():
        start = time.process_time()
        run()  # also makes what is cached
        repeats[name] = max(1, round(SAMPLE / max(time.process_time() - start, 1e-4)))
    for _ in range(ROUNDS):
        for name, (weights, run) in runs.items():
            before = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                run()
            spent = time.perf_counter() - before[0], time.process_time() - before[1]
            samples[name].append([weights * repeats[name] / s / 1e6 for s in spent])
    return {
        name: [float(f"{statistics.median(column):.4g}") for column in zip(*found, strict=True)]
        for name, found in samples.items()
    }


# --- the kernel alone --------------------------------------------------------------------------------------


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


def kernels(weight: Tensor, threads: int) -> dict[str, dict[str, Any]]:
    """Native and reference speeds, and their ratio, for each of SIZES."""
    torch.set_num_threads(threads)
    runs: dict[str, tuple[int, Run]] = {}
    for p, n in SIZES:
        points = gaussian_points(p, n)
        x = weight.flatten()[: weight.numel() // p * p].view(-1, p)
        few = x[: 2**26 // n]  # the reference takes its time
        assert torch.equal(nearest.reference(few, points), native.nearest_points(few, points))
        runs[f"p={p} n={n} native"] = (
            x.numel(),
            lambda x=x, points=points: native.nearest_points(x, points, threads=threads),
        )
        runs[f"p={p} n={n} reference"] = few.numel(), lambda x=few, points=points: nearest.reference(x, points)
    speeds = in_turns(runs)
    rows = {}
    for size in (f"p={p} n={n}" for p, n in SIZES):
        row = {name: speeds[f"{size} {name}"] for name in ("native", "reference")}
        rows[size] = {**row, "native / reference": round(row["native"][1] / row["reference"][1], 1)}
    return rows


# --- whole quantizers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantizer:
    """quantize: weight [out, in] -> what is stored. restore: that and the weight's shape -> weight, bytes."""

    quantize: Callable[[Tensor], Any]
    restore: Callable[[Any, torch.Size], tuple[Tensor, int]]
    parts: dict[str, Callable[[Tensor], object]] = field(default_factory=dict)  # timed by themselves


def paley(scheme: WeightScheme, rotated: bool) -> Quantizer:
    """As `pipeline.streaming` does it, without reading and writing files and without measuring errors."""

    def prepared(columns: int) -> tuple[Transform | None, WeightScheme]:
        if not rotated:
            return None, scheme
        transform = input_blocks(columns, HADAMARD, seed=0)
        return transform, replace(scheme, group_size=transform.order)

    def quantize(weight: Tensor) -> list[Any]:
        transform, grouped = prepared(weight.shape[1])
        stored = []
        for rows in weight.split(CHUNK // weight.shape[1]):
            part = quantize_nearest(rows if transform is None else transform.apply(rows.double()).float(), grouped)
            stored.append((part, spec.encode_linear("weight", part)))
        return stored

    def restore(stored: list[Any], shape: torch.Size) -> tuple[Tensor, int]:
        transform, _ = prepared(shape[1])
        values = torch.cat([part.dequantize().double() for part, _ in stored])
        size = sum(tensor.nbytes for _, tensors in stored for tensor in tensors.values())
        return values if transform is None else transform.adjoint(values), size

    def rounded(weight: Tensor) -> list[Any]:
        _, grouped = prepared(weight.shape[1])
        return [quantize_nearest(rows, grouped) for rows in weight.split(CHUNK // weight.shape[1])]

    parts: dict[str, Callable[[Tensor], object]] = {"quantize_nearest": rounded}
    if (grid := scheme.grid).p > 1:
        points = grid.points.float()
        parts["nearest point"] = lambda weight: native.nearest_points(weight.view(-1, grid.p), points, threads=1)
    return Quantizer(quantize, restore, parts)


def ours() -> dict[str, Quantizer]:
    found = {
        f"{grid}, rotated": paley(WeightScheme(grid, None, "nearest", "rms"), True)
        for grid in ("p2n16", "p2n64", "p4n4096", "p2n256", "gauss4")
    }
    found["p2n256, rotated, unbiased"] = paley(WeightScheme("p2n256", None, "nearest", "unbiased"), True)
    for grid in ("gauss4", "int4"):
        for search in ("absmax", "mse"):
            found[f"{grid} g64, {search}"] = paley(WeightScheme(grid, 64, "nearest", search), False)
    return found


def llama_cpp() -> dict[str, Quantizer]:
    """Types without an importance matrix, and with one of ones."""
    if not (path := os.environ.get("GGML_LIBRARY")):
        raise OSError("GGML_LIBRARY is not set; the docstring says how to build the library that it should name")
    library = ctypes.CDLL(path)
    integer, size, pointer = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, integer], size
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    library.ggml_quantize_chunk.restype = size
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

    def quantizer(kind: int, restoring: Any, ones: bool) -> Quantizer:
        def quantize(weight: Tensor) -> Tensor:
            out, columns = weight.shape
            stored = torch.empty(out * library.ggml_row_size(kind, columns), dtype=torch.uint8)
            importance = torch.ones(columns) if ones else None
            data = None if importance is None else importance.data_ptr()
            library.ggml_quantize_chunk(kind, weight.data_ptr(), stored.data_ptr(), 0, out, columns, data)
            return stored

        def restore(stored: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
            values = torch.empty(shape)
            restoring(stored.data_ptr(), values.data_ptr(), values.numel())
            return values, stored.nbytes

        return Quantizer(quantize, restore)

    found = {}
    for name, kind in GGML.items():
        if (known := library.ggml_type_name(kind).decode()).lower() != name.lower():
            raise OSError(f"{path}: type {kind} is {known}, not {name}; its numbers changed")
        restoring = getattr(library, f"dequantize_row_{known}")
        restoring.argtypes, restoring.restype = [pointer, pointer, integer], None
        if not library.ggml_quantize_requires_imatrix(kind):
            found[f"llama.cpp {name}"] = quantizer(kind, restoring, False)
        found[f"llama.cpp {name}, importances of 1"] = quantizer(kind, restoring, True)
    return found


def hqq() -> dict[str, Quantizer]:
    from hqq.core.quantize import Quantizer as Hqq

    def quantizer(bits: int, optimize: bool) -> Quantizer:
        settings = {"group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}

        def restore(stored: tuple[Tensor, dict], _: torch.Size) -> tuple[Tensor, int]:
            packed, meta = stored
            meta = {**meta, "compute_dtype": torch.float32, **{k: meta[k].half().float() for k in ("scale", "zero")}}
            return Hqq.dequantize(packed, meta), packed.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())

        return Quantizer(lambda weight: Hqq.quantize(weight, nbits=bits, optimize=optimize, **settings), restore)

    found = {f"hqq {bits}-bit g64": quantizer(bits, True) for bits in (4, 3, 2)}
    return {**found, "hqq 4-bit g64, not optimised": quantizer(4, False)}


def gguf() -> dict[str, Quantizer]:
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    def quantizer(kind: Kind) -> Quantizer:
        return Quantizer(
            lambda weight: quants.quantize(weight.numpy(), kind),
            lambda stored, _: (torch.from_numpy(quants.dequantize(stored, kind)), stored.nbytes),
        )

    return {f"gguf (numpy) {kind.name}": quantizer(kind) for kind in (Kind.Q4_0, Kind.Q8_0)}


def peers() -> tuple[dict[str, Quantizer], dict[str, str]]:
    """What can be measured here, and why the rest is absent."""
    found: dict[str, Quantizer] = {}
    absent: dict[str, str] = {}
    for make in (llama_cpp, hqq, gguf):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= make()
        except (ImportError, OSError) as error:
            absent[make.__name__] = str(error)
            print(f"{make.__name__} is skipped: {error}", flush=True)
    return found, absent


def versions(absent: dict[str, str]) -> dict[str, str]:
    found = {}
    for name in ("hqq", "gguf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "llama_cpp" not in absent:
        library = ctypes.CDLL(os.environ["GGML_LIBRARY"])
        library.ggml_version.restype = ctypes.c_char_p
        found["ggml"] = library.ggml_version().decode()
    return found


def layer() -> Tensor:
    """Real weights, float32 [6 * 320, 768]: a number of columns that every peer takes."""
    with safe_open(record.DEMO / "model.safetensors", "pt") as tensors:
        names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(6)]
        return torch.cat([tensors.get_tensor(name) for name in names]).float()[:, :768].contiguous()


def quantizers(weight: Tensor, real: Tensor) -> dict[str, Any]:
    """Speeds, bits and errors of ours and of peers, on one thread."""
    torch.set_num_threads(1)
    others, absent = peers()
    candidates = {**ours(), **others}
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, tuple[int, Run]] = {}
    for name, candidate in candidates.items():
        stored = candidate.quantize(weight)
        values, size = candidate.restore(stored, weight.shape)
        row = {"bits": round(8 * size / weight.numel(), 4), "error": rel_error(weight, values)}
        row["real error"] = rel_error(real, candidate.restore(candidate.quantize(real), real.shape)[0])
        rows[name] = row
        for part, run in {"whole": candidate.quantize, **candidate.parts}.items():
            runs[f"{name}: {part}"] = weight.numel(), lambda run=run: run(weight)
    for key, speed in in_turns(runs).items():
        name, part = key.rsplit(": ", 1)
        rows[name][part] = speed
    for name, row in rows.items():
        print(name, row, flush=True)
    base = rows["p2n256, rotated"]["whole"][1]
    ratios = {name: float(f"{base / rows[name]['whole'][1]:.3g}") for name in others}
    return {"versions": versions(absent), "absent": absent, "rows": rows, "p2n256, rotated / peer": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="for the kernel alone")
    threads = parser.parse_args().threads
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    result = {**provenance(), "quantizers": quantizers(weight, layer()), "threads": {}}
    for count in threads:
        result["threads"][str(count)] = kernels(weight, count)
        print(f"{count} threads", result["threads"][str(count)], flush=True)
    record.save(result, record.RESULTS / "nearest-speed.json")


if __name__ == "__main__":
    main()
