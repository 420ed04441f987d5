"""How fast are trellis codes found? python -m bench.trellis_search: writes bench/results/trellis-search.json.

Weights a second of one core's processor time, so that other jobs matter little; the best of some runs. `nearest`: a row
at once. `feedback`: a few codes at a time with a look ahead, as GPTQ has them, without the feedback's own sums.
`exact`: as `nearest`, if every window is searched with squared distances. Beside it t2, and how long a billion weights
take on two cores.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench.record import RESULTS, provenance, save

from paley.core import trellis
from paley.kernels import native, trellis_codes
from paley.methods.trellis import AHEAD, KEEP

ROWS, WIDTH, RUNS = 32, 1024, 5


def rate(grid: trellis.TrellisGrid, x: torch.Tensor, costs: torch.Tensor, keep: int, ahead: int) -> float:
    """Weights a second."""
    free, ones = torch.full((len(x),), -1, dtype=torch.int32), torch.ones(1, 1).expand_as(x)
    best = 0.0
    for _ in range(RUNS):
        start = time.thread_time()
        trellis_codes.codes(
            x, x.shape[1], ones, grid.table, grid.levels, costs, grid.search_scale, grid.bits_per_code, free,
            None, None, keep, ahead, threads=1,
        )  # fmt: skip
        best = max(best, x.numel() / (time.thread_time() - start))
    return best


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    x, rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), {}
    for name in trellis.names():
        grid = trellis.load(name)
        depths = {
            "nearest": (grid.costs, trellis.KEEP, grid.ahead),
            "feedback": (grid.costs, KEEP, AHEAD * grid.memory),
            "exact": (grid.costs[:, :1], trellis.KEEP, grid.ahead),  # a table without the levels of any value
        }
        rates = {how: rate(grid, x, *depth) for how, depth in depths.items()}
        billion = {how: 1e9 / 2 / found for how, found in rates.items()}
        rows[name] = {"t2": grid.mse, "weights_per_second": rates, "seconds_a_billion_on_two_cores": billion}
        said = (f"{how} {rates[how] / 1e6:5.2f} M/s, {billion[how]:4.0f} s a billion" for how in depths)
        print(f"{name:10s} t2 {grid.mse:.5f}  {'; '.join(said)}", flush=True)
    what = {"level": native.best_level(), "rows": ROWS, "width": WIDTH}
    save({**provenance(), **what, "grids": rows}, RESULTS / "trellis-search.json")


if __name__ == "__main__":
    main()
