"""Makes the grids for N(0, I_p) in src/paley/core/tables: gaussian.json, gaussian_grids.safetensors, normalfloat.json.

p = 1: Lloyd's iteration from the companding limit (points spread as the density's cube root, N(0, 3)), then Newton's
method on the same condition, "each point is its cell's mean". Newton alone, from that start, runs off to a
stationary point with an almost empty outer cell from 5 bits on.

p >= 2: over-relaxed Lloyd on fresh samples from the companding limit, N(0, (p + 2) / p), part of the restarts with
noise that dies away; the best restart on samples of its own; ever larger batches; and last the mean of each cell
over 2^23 samples and their negatives. t2 is then measured on 2^24 plain samples that nothing was trained on.
Grids already in the file stay unless named: `make_gaussian_grids.py p2n256 p4n1024` makes these anew.
Any other pPnN, p 1 to 4 and n 2 to 4096, goes to a file of its own, which `paley quantize --grid FILE` takes:
`make_gaussian_grids.py p2n100 --output p2n100.safetensors`.

NormalFloat (arXiv:2305.14314) and AbnormalFloat (arXiv:2306.06965) points follow from their definitions below.
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.linalg import solve_banded
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from torch import Tensor

from paley import kernels
from paley.core import tables
from paley.core.nearest import nearest_points

TABLES = Path(__file__).parents[1] / "src/paley/core/tables"
SCRIPT = "tools/make_gaussian_grids.py"
SIZES = {
    1: [*range(2, 17), 32, 64, 128, 256],
    2: [4, 8, 9, 12, 16, 24, 32, 45, 64, 88, 128, 181, 256, 354, 512, 1024, 2048, 4096],
    3: [16, 32, 64, 128, 256, 512, 830, 1024, 2048, 4096],
    4: [16, 64, 128, 256, 512, 830, 1024, 2048, 4096],
}
BATCH, SAMPLES = 2**20, 2**24
TEST_SEED = 10**6  # training seeds are below


def pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def cells(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability of each cell, integral of x over it, and the density at the inner edges."""
    e = np.concatenate([[-np.inf], (p[1:] + p[:-1]) / 2, [np.inf]])
    density = pdf(e)
    return np.diff(ndtr(e)), -np.diff(density), density[1:-1]


def lloyd_max(n: int, iterations: int = 300_000) -> np.ndarray:
    p = math.sqrt(3) * ndtri((np.arange(n) + 0.5) / n)
    for _ in range(iterations):
        mass, first, _ = cells(p)
        mean = first / mass
        p, moved = (mean - mean[::-1]) / 2, np.abs(mean - p).max()
        if moved < 1e-13:
            break
    for _ in range(20):
        mass, first, density = cells(p)
        gap = np.diff(p) / 4 * density  # an edge moves by half of each neighbour's move
        band = np.zeros((3, n))
        band[1] = mass
        band[1, :-1] -= gap
        band[1, 1:] -= gap
        band[0, 1:] = band[2, :-1] = -gap
        p = p - solve_banded((1, 1), band, p * mass - first)
        p = (p - p[::-1]) / 2
    return p


def exact_t2(p: np.ndarray) -> float:
    """E (x - nearest)^2 of N(0, 1) by integration."""
    mass, first, _ = cells(p)
    return float(1 - 2 * (p * first).sum() + (p**2 * mass).sum())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(n: int, p: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [n, p] as dense as an optimal grid's points, N(0, (p + 2) / p), and weights [n] that make it N(0, I).

    So every cell gets as many samples as the others. Of plain samples an outer cell may get one in 10^6.
    """
    z = torch.randn(n, p, generator=g)
    return z * math.sqrt((p + 2) / p), torch.exp(-z.square().sum(1) / p).double()


def sums(x: Tensor, weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, p], weights [N], points [n, p] -> each cell's weight [n] and weighted sum [n, p]."""
    cell, n = nearest_points(x, points).long(), len(points)
    total = [torch.bincount(cell, weights=column.double() * weights, minlength=n) for column in x.T]
    return torch.bincount(cell, weights=weights, minlength=n), torch.stack(total, 1)


def lloyd_step(points: Tensor, samples: int, relax: float, g: torch.Generator) -> Tensor:
    """Moves each point `relax` times the way to its cell's mean; one without samples joins one with many."""
    n, p = points.shape
    mass, total = sums(*spread(samples, p, g), points)
    mean = torch.where(mass[:, None] > 0, total / mass[:, None], points.double()).float()
    points = points + relax * (mean - points)
    empty = mass == 0
    if empty.any():
        crowded = torch.multinomial(mass, int(empty.sum()), generator=g)
        points[empty] = points[crowded] + 0.1 * n ** (-1 / p) * torch.randn(len(crowded), p, generator=g)
    return points


def train(p: int, n: int, seed: int, noise: float, iterations: int) -> Tensor:
    g = seeded(seed)
    points = torch.randn(n, p, generator=g) * math.sqrt((p + 2) / p)
    for i in range(iterations):
        points = lloyd_step(points, max(2**14, 200 * n), 1.7, g)
        cooling = max(0.0, 1 - i / (0.7 * iterations)) ** 2
        points += noise * cooling * n ** (-1 / p) * torch.randn(n, p, generator=g)
    for _ in range(6):  # so that the restarts differ by where they are, not by the last samples
        points = lloyd_step(points, max(2**17, 200 * n), 1.0, g)
    return points


def finish(points: Tensor, seed: int) -> Tensor:
    """Ever smaller steps, the last to the cells' means over 2^24 samples: x and -x, so that they sum to 0."""
    g = seeded(seed)
    for i in range(12):
        points = lloyd_step(points, 2**18 * (1 + i // 3), 1.4 if i < 9 else 1.0, g)
    for samples in (SAMPLES // 8, SAMPLES // 8, SAMPLES):
        mass = total = torch.zeros(())
        for _ in range(samples // BATCH):
            x, weights = spread(BATCH // 2, points.shape[1], g)
            part = sums(torch.cat([x, -x]), weights.repeat(2), points)
            mass, total = mass + part[0], total + part[1]
        points = (total / mass[:, None]).float()
    return points


def measure(points: Tensor, seed: int, samples: int) -> tuple[float, float]:
    """t2 = E|x - nearest|^2 / p and its standard error."""
    g, p = seeded(seed), points.shape[1]
    first = second = 0.0
    for _ in range(samples // BATCH):
        x = torch.randn(BATCH, p, generator=g)
        error = (x - points[nearest_points(x, points).long()]).double().square().sum(1) / p
        first, second = first + float(error.sum()), second + float(error.square().sum())
    mean = first / samples
    return mean, math.sqrt((second / samples - mean**2) / samples)


def make(p: int, n: int) -> tuple[Tensor, dict]:
    if p == 1:
        points = lloyd_max(n)
        return torch.tensor(points)[:, None].float(), {"t2": exact_t2(points), "stderr": 0.0, "samples": "exact"}
    seed = 100_000 * p + 20 * n  # room for restarts
    restarts = 8 if n <= 256 else 4 if n <= 1024 else 2 if n <= 2048 else 1
    iterations = 500 if n <= 256 else 150
    tried = [train(p, n, seed + r, noise=0.3 if r % 2 else 0.0, iterations=iterations) for r in range(restarts)]
    if restarts > 1:
        scores = [measure(points, seed + 18, BATCH)[0] for points in tried]
        tried = [tried[int(np.argmin(scores))]]
    points = torch.tensor(sorted(finish(tried[0], seed + 19).tolist()))
    t2, stderr = measure(points, TEST_SEED + seed, SAMPLES)
    return points, {"t2": t2, "stderr": stderr, "samples": SAMPLES, "seed": seed, "restarts": restarts}


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.exists():
        return {}, {}
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["grids"])  # noqa: SIM118


def write(path: Path, tensors: dict[str, Tensor], records: dict) -> None:
    records["about"] = {
        "what": "points [n, p] of least t2 = E|x - nearest|^2 / p for x ~ N(0, I_p), in lexicographic order",
        "script": SCRIPT,
        "torch": torch.__version__,
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"grids": json.dumps(records, sort_keys=True)})
    partial.chmod(0o644)  # safetensors lets only the owner read
    os.replace(partial, path)


def make_gaussian_grids(anew: list[str]) -> None:
    path = TABLES / "gaussian_grids.safetensors"
    by_size = sorted((n, p) for p, sizes in SIZES.items() for n in sizes)
    for n, p in by_size:
        name, start = f"p{p}n{n}", time.process_time()
        grids, records = read(path)
        if name in grids and name not in anew:
            continue
        grids[name], records[name] = make(p, n)
        write(path, grids, records)
        print(f"{name}: t2 {records[name]['t2']:.6g}, {time.process_time() - start:.1f} s", flush=True)


def make_file(name: str, output: Path) -> None:
    """One grid into a file of its own: a tensor `points`, and of the grid what the packaged file records."""
    if output.suffix != ".safetensors":
        raise SystemExit(f"{output}: --grid reads points from .safetensors files alone; name it so")
    if output.exists():
        raise SystemExit(f"{output}: is there already; remove it, or name another file")
    if not output.absolute().parent.is_dir():
        raise SystemExit(f"{output}: there is no folder {output.parent}; make it first")
    start = time.process_time()
    points, record = make(*sized(name))
    write(output, {"points": points}, {name: record})
    print(f"{name}: t2 {record['t2']:.6g}, {time.process_time() - start:.1f} s, written to {output}")


def sized(name: str) -> tuple[int, int]:
    """'p2n100' -> (2, 100)."""
    if (size := tables.size_of(name)) is None:
        raise SystemExit(
            f"{name}: no grid of this name can be made; give p<p>n<n>, p values from 1 to {tables.MAX_DIM} "
            f"and n points from 2 to {tables.MAX_POINTS}"
        )
    return size


def make_packaged(names: list[str]) -> None:
    for name in names:
        p, n = sized(name)
        if n not in SIZES[p]:
            raise SystemExit(f"{name}: is not packaged; --output {name}.safetensors makes it in a file of its own")
    if not (TABLES / "gaussian.json").exists():  # checkpoints depend on its exact numbers
        make_gaussian_json()
    make_normal_floats()
    make_gaussian_grids(anew=names)


def make_gaussian_json() -> None:
    points = {str(b): lloyd_max(2**b)[2 ** (b - 1) :].tolist() for b in range(2, 9)}
    provenance = f"Lloyd-Max quantizer of N(0, 1), positive half; {SCRIPT}"
    (TABLES / "gaussian.json").write_text(json.dumps({"provenance": provenance, "points": points}, indent=1) + "\n")


def normal_float(bits: int) -> np.ndarray:
    """Quantiles of N(0, 1), evenly spaced in probability on either side of an exact 0, scaled to [-1, 1]."""
    half = 2 ** (bits - 1)
    tail = (1 / (4 * half) + 1 / (4 * half - 2)) / 2  # bitsandbytes' 1 - 0.9677083 at 4 bits
    negative, positive = ndtri(np.linspace(tail, 0.5, half)), ndtri(np.linspace(0.5, 1 - tail, half + 1))
    return np.concatenate([-negative[:-1] / negative[0], [0.0], positive[1:] / positive[-1]])


def abnormal_float(bits: int, block: int = 64) -> np.ndarray:
    """-1, 0, 1 and cell medians (least E|error|) of N(0, 1) over the largest |x| of its block.

    As published, each side is optimised as if its innermost cell ended at 0, where one more point is put afterwards.
    """
    u, weights = np.polynomial.legendre.leggauss(400)
    largest = ndtri((1 + ((u + 1) / 2) ** (1 / block)) / 2)  # quantiles of a block's largest |x|
    weights = weights / 2 / (2 * ndtr(largest) - 1)

    def mass(y: float) -> float:
        """P(0 < x < y · largest) of the elements that are not the largest."""
        return float(((ndtr(y * largest) - 0.5) * weights).sum())

    def side(n: int) -> np.ndarray:
        p = np.arange(1, n + 1) / n
        for _ in range(5000):
            edges = [0.0, *((p[1:] + p[:-1]) / 2)]
            below, before = [mass(e) for e in edges], p
            middles = [(a + b) / 2 for a, b in itertools.pairwise(below)]
            medians = [brentq(lambda y, m=m: mass(y) - m, 0, 1, xtol=1e-15) for m in middles]
            p = np.array([*medians, 1.0])
            if np.abs(p - before).max() < 1e-12:
                break
        return p

    half = 2 ** (bits - 1)
    return np.concatenate([-side(half - 1)[::-1], [0.0], side(half)])


def make_normal_floats() -> None:
    about = {
        "nf": "NormalFloat (arXiv:2305.14314): quantiles of N(0, 1) with an exact 0",
        "af": "AbnormalFloat (arXiv:2306.06965): medians for absmax-scaled blocks of 64, with -1, 0 and 1",
        "script": SCRIPT,
    }
    points = {f"nf{b}": normal_float(b).tolist() for b in (2, 3, 4)}
    points |= {f"af{b}": abnormal_float(b).tolist() for b in (3, 4)}
    (TABLES / "normalfloat.json").write_text(json.dumps({"provenance": about, "points": points}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="pPnN", help="packaged grids to make anew; one with --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .safetensors file for the one grid named")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kernels.register()
    if given.output is None:
        make_packaged(given.names)
    elif len(given.names) != 1:
        raise SystemExit(f"--output {given.output}: takes one grid a file, got {len(given.names)} names")
    else:
        make_file(given.names[0], given.output)


if __name__ == "__main__":
    main()
