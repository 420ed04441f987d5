"""What a rotation does to an outlier: the bounds of arXiv:2504.13989 (Figure 3) beside measurements.

    python examples/theory.py [--output figure3.png]

x has k entries of size c and small noise elsewhere. A Hadamard rotation leaves a peak of at most k·c/√n, a
random orthogonal one about c·√(2k·ln n / n); no rotation takes every single outlier below c/√n (Theorem 3.2).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.hadamard import factor, transform

__all__ = [
    "PeakPoint",
    "check_figure",
    "draw",
    "flatness",
    "hadamard_peak",
    "main",
    "measure_peaks",
    "random_orthogonal",
    "random_peak",
    "spiked_vector",
]


# Figure 3's range; one random rotation of 4096 dimensions alone takes a minute.
DIMS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class PeakPoint:
    """max|Rx| at one dimension: means over the seeds, and what theory predicts."""

    dim: int
    random: float
    hadamard: float
    random_predicted: float
    hadamard_predicted: float


def hadamard_peak(dim: int, peak: float, outliers: int = 1) -> float:
    """k·c/√n: Theorem 3.1 (k = 1), Lemma 3.1."""
    return outliers * peak / math.sqrt(dim)


def random_peak(dim: int, peak: float, outliers: int = 1) -> float:
    """c·√(2k·ln n / n): Theorem 3.1 (k = 1), Lemma 3.2."""
    return peak * math.sqrt(2 * outliers * math.log(dim) / dim)


def flatness(q: Tensor) -> float:
    """√n·max|Q_ij| of an orthogonal q [n, n]: at least 1, and 1 only where √n·Q is Hadamard (Theorem 3.2)."""
    return math.sqrt(q.shape[0]) * q.abs().max().item()


def random_orthogonal(dim: int, generator: torch.Generator) -> Tensor:
    """float64 [dim, dim], Haar-distributed: QR of a Gaussian, with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def spiked_vector(
    dim: int, generator: torch.Generator, *, peak: float = 200.0, noise: float = 0.1, outliers: int = 1
) -> Tensor:
    """float64 [dim]: Gaussian noise with `outliers` entries, at random places, set to ±peak."""
    x = noise * torch.randn(dim, dtype=torch.float64, generator=generator)
    x[torch.randperm(dim, generator=generator)[:outliers]] = peak * _signs(outliers, generator)
    return x


def measure_peaks(
    dims: Iterable[int],
    *,
    peak: float = 200.0,
    noise: float = 0.1,
    outliers: int = 1,
    seeds: Sequence[int] = range(8),
) -> list[PeakPoint]:
    """Figure 3: mean max|Rx| over seeds, for random and Hadamard rotations of spiked vectors of each dim."""
    points = []
    for dim in dims:
        factor(dim)  # an unreachable dimension is refused before any work
        random_total = hadamard_total = 0.0
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            x = spiked_vector(dim, generator, peak=peak, noise=noise, outliers=outliers)
            random_total += (random_orthogonal(dim, generator) @ x).abs().max().item()
            hadamard_total += transform(x * _signs(dim, generator), dim).abs().max().item()
        points.append(
            PeakPoint(
                dim=dim,
                random=random_total / len(seeds),
                hadamard=hadamard_total / len(seeds),
                random_predicted=random_peak(dim, peak, outliers),
                hadamard_predicted=hadamard_peak(dim, peak, outliers),
            )
        )
    return points


def draw(points: Sequence[PeakPoint], path: str | Path) -> None:
    """Writes the curves to `path` (format by its suffix); needs matplotlib."""
    check_figure(path)
    dims = [p.dim for p in points]
    figure = _figure()
    axes = figure.add_subplot()
    axes.loglog(dims, [p.random for p in points], "o", color="C0", label="random orthogonal, measured")
    axes.loglog(dims, [p.random_predicted for p in points], "-", color="C0", label="theory, c·√(2k·ln n / n)")
    axes.loglog(dims, [p.hadamard for p in points], "s", color="C1", label="Hadamard, measured")
    axes.loglog(dims, [p.hadamard_predicted for p in points], "-", color="C1", label="theory, k·c/√n")
    axes.set_xlabel("dimension n")
    axes.set_ylabel("max |Rx|")
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise PaleyError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_figure(path: str | Path) -> None:
    """Raises where `draw` could not write `path`, so that nothing is measured in vain."""
    path = Path(path)
    known = sorted(_figure().canvas.get_supported_filetypes())
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in known:
        what = f"no picture format '{path.suffix}'" if suffix else "has no suffix that says the format"
        raise PaleyError(f"{path}: {what}; known: {', '.join(known)}{nearest_name(suffix, known)}")
    if not path.absolute().parent.is_dir():
        raise PaleyError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise PaleyError(f"{path}: is a folder; give the picture's file")


def _figure() -> Any:
    """An empty figure of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PaleyError("drawing needs matplotlib; pip install matplotlib") from error
    return Figure(figsize=(6, 4), layout="constrained")


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, (n,), generator=generator) - 1).to(torch.float64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the measured peaks beside the theory's; one entry of 200 among noise of 0.1, mean of 8 draws."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", metavar="FILE", help="also draw it: .png, .svg or .pdf")
    output = parser.parse_args(arguments).output
    try:
        if output is not None:
            check_figure(output)
        points = measure_peaks(DIMS)
        if output is not None:
            draw(points, output)
    except PaleyError as error:
        parser.exit(2, f"error: {error}\n")
    print("dimension  random, measured  theory  Hadamard, measured  theory")
    for p in points:
        print(
            f"{p.dim:9}  {p.random:16.2f}  {p.random_predicted:6.2f}  {p.hadamard:18.2f}  {p.hadamard_predicted:6.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
