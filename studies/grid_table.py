"""Makes studies/results/grids.json: every grid's error on N(0, 1) beside HIGGS's figures and Shannon's bound.

t2 = E|x - nearest|^2 / p at the scale of least error; of trellis codes on rows of 1024 values, as rings, by the search
that quantizing makes. NormalFloat and AbnormalFloat are scaled by the largest |x| of
a block of 64, exactly: that scale's 16 / 64 bits a value are said apart, in scale_bits.
"""

import argparse
import math

import torch
from bench.record import save
from studies.experiment import RESULTS

from paley.core import grids, lattice, tables, trellis

ROWS, ROW = 2**11, 2**10  # of trellis codes
BLOCK, BLOCKS, SEED = 64, 2**12, 64
BATCHES = 2**24 // (BLOCK * BLOCKS)

# arXiv:2411.17525 and its published experiments; uniform grids by their levels.
PUBLISHED = {
    "p1n4": 0.1175, "p1n8": 0.0345, "p1n16": 0.0095, "p1n256": 4.1e-5,
    "p2n16": 0.1074, "p2n64": 0.0297, "p2n88": 0.0220, "p2n256": 0.00776, "p2n1024": 0.00205, "p2n4096": 0.00059,
    "p3n64": 0.1009, "p3n512": 0.0269, "p3n4096": 0.0069,
    "p4n256": 0.0959, "p4n1024": 0.0500, "p4n4096": 0.0255,
    "odd2": 0.1189, "odd3": 0.0374, "odd4": 0.01155, "odd8": 8.8e-5,
}  # fmt: skip


def row(name: str, p: int, n: int, t2: float, stderr: float, scale_bits: float = 0.0) -> dict:
    bits = math.log2(n) / p
    published = PUBLISHED.get(name)
    return {
        "name": name,
        "p": p,
        "n": n,
        "bits": bits,
        "scale_bits": scale_bits,
        "t2": t2,
        "stderr": stderr,
        "published": published,
        "ratio_to_published": t2 / published if published else None,
        "ratio_to_shannon": t2 * 4**bits,
        "decibels_to_shannon": 10 * math.log10(t2 * 4**bits),
    }


def absmax_error(name: str) -> tuple[float, float]:
    """t2 on 2^24 samples and its standard error over the blocks."""
    grid, g, parts = grids.load(name), torch.Generator().manual_seed(SEED), []
    for _ in range(BATCHES):
        x = torch.randn(BLOCKS, BLOCK, generator=g)
        scale = x.abs().amax(1, keepdim=True) / grid.peak
        y = grid.decode(grid.nearest((x / scale).view(-1, 1))).view_as(x)
        parts.append((x - y * scale).double().square().mean(1))
    error = torch.cat(parts)
    return float(error.mean()), float(error.std() / math.sqrt(len(error)))


def trellis_error(name: str) -> tuple[float, float]:
    """t2 and its standard error over rows."""
    grid = trellis.load(name)
    x = torch.randn(ROWS, ROW, generator=torch.Generator().manual_seed(SEED))
    values = grid.decode(grid.search(x)).flatten(1)[:, :ROW]
    error = (x - values).double().square().mean(1)
    return float(error.mean()), float(error.std() / math.sqrt(len(error)))


def rows() -> list[dict]:
    found = []
    for name in tables.names():
        n, p = tables.gaussian_grid(name)[0].shape
        found.append(row(name, p, n, tables.record(name)["t2"], tables.record(name)["stderr"]))
    for bits in range(2, 9):
        grid = grids.load(f"odd{bits}")
        found.append(row(grid.name, 1, 2**bits, grid.gaussian_mse(grid.gaussian_scale), 0.0))
    for name in ("nf2", "nf3", "nf4", "af3", "af4"):
        found.append(row(name, 1, grids.load(name).size, *absmax_error(name), scale_bits=16 / BLOCK))
    for name in lattice.names():
        grid = lattice.load(name)
        found.append(row(name, 8, grid.size, grid.mse, lattice.record(name)["stderr"]))
    for name in trellis.names():
        grid = trellis.load(name)
        found.append(row(name, grid.p, grid.size, *trellis_error(name)))
    return sorted(found, key=lambda r: (r["bits"], r["t2"]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    table = rows()
    save({"script": "studies/grid_table.py", "grids": table}, RESULTS / "grids.json")
    for r in table:
        ratio = f"{r['ratio_to_published']:.4f}" if r["published"] else "-"
        print(
            f"{r['name']:9} {r['bits'] + r['scale_bits']:6.3f} bits  t2 {r['t2']:.6g} ± {r['stderr']:.1g}"
            f"  published {r['published'] or '-'} ratio {ratio}  {r['decibels_to_shannon']:.2f} dB"
        )


if __name__ == "__main__":
    main()
