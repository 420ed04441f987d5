"""Makes src/paley/core/tables/gaussian.json: the Lloyd-Max points of N(0, 1) for 2 to 8 bits.

Newton's method on the stationarity condition "each point is its cell's mean", in float64, from the
companding limit (points spread as the density's cube root, N(0, 3)).
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


def lloyd_max(n: int) -> np.ndarray:
    p = math.sqrt(3) * ndtri((np.arange(n) + 0.5) / n)
    for _ in range(200):
        e = np.concatenate([[-np.inf], (p[1:] + p[:-1]) / 2, [np.inf]])
        mass, density = np.diff(ndtr(e)), pdf(e)
        residual = p * mass + np.diff(density)  # p_i P_i - E[x; cell i], with E[x; a..b] = pdf(a) - pdf(b)
        # d residual_i / d p_j: edges move by half of each neighbour.
        gap = np.diff(p) / 2 * density[1:-1]  # (p_{i+1} - p_i)/2 * pdf(edge)
        band = np.zeros((3, n))
        band[1] = mass
        band[1, :-1] -= gap / 2
        band[1, 1:] -= gap / 2
        band[0, 1:] = -gap / 2
        band[2, :-1] = -gap / 2
        move = solve_banded((1, 1), band, residual)
        limit = 0.4 * np.diff(p).min() / max(np.abs(np.diff(move)).max(), 1e-300)
        p = p - min(1.0, limit) * move
        p = (p - p[::-1]) / 2
        if np.abs(move).max() < 1e-14:
            break
    return p


if __name__ == "__main__":
    points = {str(b): lloyd_max(2**b)[2 ** (b - 1) :].tolist() for b in range(2, 9)}
    provenance = "Lloyd-Max quantizer of N(0, 1), positive half; benchmarks/make_gaussian_grids.py"
    OUT.write_text(json.dumps({"provenance": provenance, "points": points}, indent=1) + "\n")
