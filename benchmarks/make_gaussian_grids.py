"""Makes src/paley/core/tables/gaussian.json: the Lloyd-Max points of N(0, 1) for 2 to 8 bits.

Lloyd's iteration from the companding limit (points spread as the density's cube root, N(0, 3)), then Newton's
method on the same condition, "each point is its cell's mean". Newton alone, from that start, runs off to a
stationary point with an almost empty outer cell from 5 bits on.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

OUT = Path(__file__).parents[1] / "src/paley/core/tables/gaussian.json"


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


if __name__ == "__main__":
    points = {str(b): lloyd_max(2**b)[2 ** (b - 1) :].tolist() for b in range(2, 9)}
    provenance = "Lloyd-Max quantizer of N(0, 1), positive half; benchmarks/make_gaussian_grids.py"
    OUT.write_text(json.dumps({"provenance": provenance, "points": points}, indent=1) + "\n")
