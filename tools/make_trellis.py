"""Makes src/paley/core/tables/trellis.json: the values of a trellis' states, and the scale of each rate.

The values are quantiles of a distribution a little wider at its ends than N(0, 1), as fixed rates need it, in a random
order, rounded to 8 bits: products of integers are exact. Each rate has the scale of least error, of a few, and its t2
is measured on rows of 1024 values of N(0, 1).
"""

import argparse
import json
import math
from pathlib import Path

import torch

from paley import kernels
from paley.core import trellis
from paley.core.trellis import STATE_BITS, TrellisGrid

OUT = Path(__file__).parents[1] / "src/paley/core/tables/trellis.json"
SCRIPT = "tools/make_trellis.py"
RATES = {  # name -> bits of a code, values of a code
    "trellis1": (1, 1), "trellis1.5": (3, 2), "trellis2": (2, 1), "trellis2.5": (5, 2), "trellis3": (3, 1),
    "trellis3.5": (7, 2), "trellis4": (4, 1), "trellis5": (5, 1),
}  # fmt: skip
WIDER = 0.05
BETAS = [round(0.86 + 0.02 * i, 2) for i in range(20)]
ROWS, WIDTH, SEED = 64, 1024, 2406_11235


def values() -> list[list[int]]:
    """Integers of 8 bits [2, 2^STATE_BITS]; their largest is 127."""
    n, generator = 2**STATE_BITS, torch.Generator().manual_seed(SEED)
    q = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    q = q * (1 + WIDER * (q.square() - 1) / 6)
    whole = (q / q.max() * 127).round().long()
    return [whole[torch.randperm(n, generator=generator)].tolist() for _ in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"measured rows of {WIDTH} values, {ROWS} by default")
    arguments = parser.parse_args()
    kernels.register()  # the native search, if it was built
    data = {"script": SCRIPT, "seed": SEED, "values": values(), "grids": {}}
    trellis._data = lambda: data  # the grids below read what is being made
    unit = 1 / math.sqrt(sum(v * v for v in data["values"][0]) / 2**STATE_BITS)
    x = torch.randn(arguments.rows, WIDTH, generator=torch.Generator().manual_seed(SEED))
    for name, (bits, p) in RATES.items():
        best = None
        for beta in BETAS:
            grid = TrellisGrid(name, bits, p, unit * beta, math.nan)
            errors = (grid.look_up(grid.search(x)) - x).square().mean(1) / x.square().mean(1)
            if best is None or float(errors.mean()) < best["t2"]:
                chosen, spread = beta, float(errors.std()) / arguments.rows**0.5
                best = {"bits": bits, "p": p, "step": unit * beta, "t2": float(errors.mean()), "stderr": spread}
        if chosen in (BETAS[0], BETAS[-1]):
            raise SystemExit(f"{name}: the best scale {chosen} is at an end of those tried")
        data["grids"][name] = best
        bound = 4.0 ** (-bits / p)
        print(
            f"{name}: t2 {best['t2']:.5f} ± {best['stderr']:.5f}, {10 * math.log10(best['t2'] / bound):.2f} dB",
            flush=True,
        )
    OUT.write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
