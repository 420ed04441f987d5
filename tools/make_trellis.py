"""Makes src/paley/core/tables/trellis.json: for each rate the lists that make a state's value, and the scale.

The codes that can follow a state lead to values that are spread evenly over 256 quantiles, and what came before moves
all of them by a part of their distance: evenly spread amounts, in a random order, the best of a few. Of two values to
a code, the codes make a lattice. The 256 values then become means of what is rounded to them (Lloyd), and integers of 8
bits. t2 is measured on other rows of 1024 values of N(0, 1). Codes in checkpoints mean what the lists say, so lists in
the file stay, and only those that it lacks are made.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from paley import kernels
from paley.core.trellis import HALF_BITS, Codebook, TrellisGrid, load

OUT = Path(__file__).parents[1] / "src/paley/core/tables/trellis.json"
SCRIPT = "tools/make_trellis.py"
RATES = {  # name -> bits of a code; what a code is multiplied by, modulo their number, for each of its values
    "trellis1": (1, (1,)), "trellis1.5": (3, (1, 3)), "trellis2": (2, (1,)), "trellis2.5": (5, (1, 5)),
    "trellis3": (3, (1,)), "trellis3.5": (7, (1, 47)), "trellis4": (4, (1,)), "trellis5": (5, (1,)),
    "trellis6": (6, (1,)),
}  # fmt: skip
WIDER, PLACES, HALF = 0.05, 256, 2**HALF_BITS
BETAS = (0.96, 1.04, 1.12)  # times the quantiles; the more bits, the farther out the best values are
BETAS_OF = {"trellis6": (1.24, 1.3, 1.36)}
TRIED, FEW, ROUNDS = 24, 64, 8  # orders, and rows to judge them on; of Lloyd's method
ROWS, WIDTH, SEED = 256, 1024, 2406_11235


def lists(bits: int, factors: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> low, high [p, HALF]."""
    size, near = 2**bits, PLACES >> bits
    low, high = [], []
    for factor in factors:
        states = torch.arange(HALF)
        of_code = factor * near * states
        before = max(1, HALF >> bits)  # what the lower half has of codes before
        moved = torch.randperm(before, generator=generator) * near // before
        low.append((of_code + moved[states // size]) % PLACES)
        rest = max(0, bits - HALF_BITS)  # bits of the code in the upper half
        others = torch.randperm(HALF, generator=generator) * (PLACES // HALF)
        others += torch.randint(PLACES // HALF, (HALF,), generator=generator)
        high.append((factor * near * HALF * (states % 2**rest) + others[states >> rest]) % PLACES)
    return torch.stack(low), torch.stack(high)


def quantiles() -> Tensor:
    """Of a distribution a little wider at its ends than N(0, 1), as fixed rates need it; float64 [PLACES]."""
    q = torch.special.ndtri((torch.arange(PLACES, dtype=torch.float64) + 0.5) / PLACES)
    return q * (1 + WIDER * (q.square() - 1) / 6)


def grid_of(name: str, bits: int, low: Tensor, high: Tensor, points: Tensor) -> TrellisGrid:
    """points float64, ascending, symmetric: they are rounded to integers of 8 bits."""
    step = float(points.abs().max()) / 127
    codebook = Codebook(low.tolist(), high.tolist(), (points[: PLACES // 2] / step).round().int().tolist())
    return TrellisGrid(name, bits, len(low), step, math.nan, codebook)


def errors(grid: TrellisGrid, x: Tensor) -> Tensor:
    """t2 of each row of x."""
    return (grid.look_up(grid.search(x), x.shape[1]) - x).square().mean(1) / x.square().mean(1)


def lloyd(grid: TrellisGrid, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    """-> the mean of what is rounded to each point, and of what is rounded to its opposite, float64 [PLACES]."""
    codes = grid.search(x).long()
    state = sum(codes.roll(back, 1) << back * grid.bits_per_code for back in range(grid.memory)) % HALF**2
    place = (low[:, state % HALF] + high[:, state // HALF]) % PLACES  # [p, rows, codes]
    place = place.permute(1, 2, 0).flatten(1)[:, : x.shape[1]].flatten()
    total = torch.zeros(PLACES, dtype=torch.float64).index_add_(0, place, x.flatten().double())
    count = place.bincount(minlength=PLACES)
    return ((total - total.flip(0)) / (count + count.flip(0)).clamp(min=1)).sort().values


def measured(grid: TrellisGrid, x: Tensor) -> dict[str, float]:
    """t2 of rows x and its standard error."""
    of_rows = errors(grid, x)
    t2, stderr = float(of_rows.mean()), float(of_rows.std()) / len(x) ** 0.5
    print(f"{grid.name}: t2 {t2:.5f} ± {stderr:.5f}, {10 * math.log10(t2 / 4.0**-grid.bits):.2f} dB", flush=True)
    return {"t2": t2, "stderr": stderr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"measured rows of {WIDTH} values, {ROWS} by default")
    parser.add_argument("--measure", action="store_true", help="make no new lists, only measure those of the file")
    arguments = parser.parse_args()
    kernels.register()  # the native search, if it was built
    generator = torch.Generator().manual_seed(SEED)
    test, x = (torch.randn(rows, WIDTH, generator=generator) for rows in (arguments.rows, 2 * arguments.rows))
    data: dict = {"script": SCRIPT, "seed": SEED, "grids": {}}
    if OUT.exists():
        data = json.loads(OUT.read_text(encoding="utf-8"))
    if arguments.measure:
        for name in data["grids"]:
            data["grids"][name] |= measured(load(name), test)
        OUT.write_text(json.dumps(data) + "\n", encoding="utf-8")
        return
    for name in (name for name in RATES if name not in data["grids"]):
        bits, factors = RATES[name]
        best = (math.inf, *lists(bits, factors, generator), torch.empty(0))
        for _ in range(TRIED):
            low, high = lists(bits, factors, generator)
            for beta in BETAS_OF.get(name, BETAS):
                points = quantiles() * beta
                error = float(errors(grid_of(name, bits, low, high, points), x[:FEW]).mean())
                best = min(best, (error, low, high, points), key=lambda found: found[0])
        _, low, high, points = best
        found = (math.inf, points)
        for _ in range(ROUNDS):
            grid = grid_of(name, bits, low, high, points)
            found = min(found, (float(errors(grid, x).mean()), points), key=lambda one: one[0])
            points = lloyd(grid, low, high, x)
        grid = grid_of(name, bits, low, high, found[1])
        data["grids"][name] = {
            "bits": bits, "p": grid.p, "step": grid.step_size, **measured(grid, test), **vars(grid.codebook)
        }  # fmt: skip
        data["grids"][name].pop("values", None)
        print(f"{name}: quantiles {best[0]:.5f}, means {found[0]:.5f}", flush=True)
    OUT.write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
