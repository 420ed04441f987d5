"""Makes studies/results/binary-gaussian.json: what a few centroids per group leave of N(0, 1), beside 2-bit grids.

t2 is the relative squared error; bits count the codes and float16 scales or centroids (2 bits a zero on uint2).
"""

from __future__ import annotations

import argparse
import math

import torch
from studies.experiment import RESULTS, provenance, save
from torch import Tensor

from paley.core import grids
from paley.core.schemes import WeightScheme
from paley.methods.binary import fit_centroids
from paley.methods.nearest import quantize_nearest

ROWS, COLUMNS, SEED = 2**13, 2**10, 0
GROUP_SIZES = (64, 128, 256)
FITTED = {"four centroids": (4, False), "two scales": (4, True), "one bit": (2, True)}


def fitted(weight: Tensor, group_size: int, size: int, mirrored: bool) -> Tensor:
    """weight [out, in] -> its nearest centroids [out, in]."""
    groups = weight.unflatten(1, (-1, group_size))
    points = fit_centroids(groups, None, size, mirrored=mirrored)
    if mirrored:
        points = torch.cat([-points.flip(-1), points], -1)
    edges = (points[..., 1:] + points[..., :-1]) / 2
    return points.gather(-1, torch.searchsorted(edges, groups)).flatten(1)


def row(weight: Tensor, name: str, group_size: int, found: Tensor, bits: float) -> dict:
    """t2 of `found`, and its standard error over the rows."""
    error = (found - weight).double().square().sum(1) / weight.double().square().sum() * len(weight)
    return {
        "name": name,
        "group_size": group_size,
        "bits_per_weight": bits,
        "t2": float(error.mean()),
        "stderr": float(error.std() / math.sqrt(len(error))),
    }


def rows(weight: Tensor, group_size: int) -> list[dict]:
    table = []
    for name, (size, mirrored) in FITTED.items():
        found = fitted(weight, group_size, size, mirrored)
        bits = math.log2(size) + 16 * (size // 2 if mirrored else size) / group_size
        table.append(row(weight, name, group_size, found, bits))
    for name, grid, scale_search, zero_bits in (
        ("INT2 min-max", "uint2", "absmax", 2),
        ("HIGGS p2n16", "p2n16", "rms", 0),
    ):
        found = quantize_nearest(weight, WeightScheme(grid, group_size, scale_search=scale_search)).dequantize()
        bits = grids.load(grid).bits + (16 + zero_bits) / group_size
        table.append(row(weight, name, group_size, found, bits))
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED))
    table = [r for group_size in GROUP_SIZES for r in rows(weight, group_size)]
    result = {"script": "studies/binary_table.py", "samples": weight.numel(), **provenance(), "rows": table}
    save(result, RESULTS / "binary-gaussian.json")
    for r in table:
        print(f"{r['group_size']:3d} {r['name']:15} {r['bits_per_weight']:.3f} bits  "
              f"t2 {r['t2']:.4f} ± {r['stderr']:.1g}")  # fmt: skip


if __name__ == "__main__":
    main()
