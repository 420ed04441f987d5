"""Weight methods at equal stored bits, weights alone: writes studies/results/weights-MODEL.json.

python -m studies.weights MODEL [--text FILE] [--bits 2,2.5,3,3.25,4.02,4.25] [--only RE]
For each budget, to which one float16 scale for each row (or 1024 columns of it) is added, every method gets the most
accurate setting that it has within it, all scales included: a row may fall short of its budget but never exceeds it by
more than 0.02 bits. Where a method has none, there is no row. hqq, if installed, runs on the same weights, its scales
and zeros counted as float16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from studies.experiment import BLOCKS_ALONE, Experiment

from paley.core import grids, tables
from paley.core.packing import stored_bits
from paley.eval.perplexity import evaluate
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import measure_for
from paley.recipe import Recipe, apply_settings, preset
from paley.sensitivity import Sensitivity

try:
    from hqq.core.quantize import Quantizer
except ImportError:
    Quantizer = None

HIGGS = "higgs-2" + BLOCKS_ALONE
BITS = (2, 2.5, 3, 3.25, 4.02, 4.25)
SLACK = 0.02
GROUPS = (None, 128, 64, 32, 16)


def scale_bits(widths: dict[int, int]) -> float:
    """Bits for each weight of one scale a row, or 1024 columns of it; widths: of inputs -> weights that have them."""
    return sum(16 / min(width, 1024) * count for width, count in widths.items()) / sum(widths.values())


def recipes(budget: float, widths: dict[int, int]) -> Iterator[tuple[str, Recipe]]:
    """(method, recipe) of everything but hqq and allocation."""
    for name, base, settings, families in (
        ("rtn", "rtn-w4a16", (), ("int",)),
        ("nf", "rtn-w4a16", (), ("nf",)),
        ("af", "rtn-w4a16", (), ("af",)),
        ("gptq", "quarot-w4a16", ("rotate=none", "expand_mlp=0"), ("int",)),
        ("ours, w?a16", "gbs-w4a16", ("weights.scale_search=mse",), ("gauss",)),
    ):
        found = _best_grouped(budget, widths, families)
        if found is not None:
            grid, group = found
            size = "null" if group is None else group
            grouped = [*settings, f"weights.grid={grid}", f"weights.group_size={size}"]
            yield name, apply_settings(preset(base + BLOCKS_ALONE), grouped)
    overhead = scale_bits(widths)
    for dimension in (1, 2, 3, 4):
        grid = _best_grid([n for n in tables.names() if n.startswith(f"p{dimension}")], budget - overhead)
        if grid is not None:
            yield f"higgs p={dimension}", _higgs(grid, "rms")
            if dimension in (2, 4):
                yield f"unbiased p={dimension}", _higgs(grid)
            if dimension == 2:
                yield "p=2 + gptq", _calibrated(_higgs(grid))
                yield "p=2 + gptq, ours", _ours(grid)
    grid = _best_grid([n for n in grids.names() if n.startswith("e8")], budget - overhead)
    if grid is not None:
        yield "e8", _higgs(grid, "rms")


def _best_grouped(budget: float, widths: dict[int, int], families: tuple[str, ...]) -> tuple[str, int | None] | None:
    """The most bits, and then the smallest groups, that the budget has room for."""
    fitting = [
        (bits + (16 / group if group else scale_bits(widths)), f"{family}{bits}", group)
        for family in families
        for bits in range(2, 9)
        for group in GROUPS
        if f"{family}{bits}" in grids.names() and (group is None or all(w % group == 0 for w in widths))
    ]
    fitting = [f for f in fitting if f[0] <= budget + SLACK]
    if not fitting:
        return None
    _, grid, group = max(fitting, key=lambda f: (grids.load(f[1]).bits, f[0]))
    return grid, group


def _best_grid(names: list[str], bits: float) -> str | None:
    fitting = [name for name in names if stored_bits(grids.load(name)) <= bits + SLACK]
    return min(fitting, key=lambda name: grids.load(name).mse, default=None)


def _higgs(grid: str, scale_search: str = "unbiased") -> Recipe:
    """rms: as published."""
    return apply_settings(preset(HIGGS), [f"weights.grid={grid}", f"weights.scale_search={scale_search}"])


def _calibrated(recipe: Recipe) -> Recipe:
    """With GPTQ in the rotated coordinates, and our compensation for what came before."""
    return apply_settings(recipe, ["weights.method=gptq"])


def _ours(grid: str) -> Recipe:
    """Ours for weights alone, on the same grid: rotations folded, GPTQ, the residual stream as its aim."""
    return apply_settings(preset("gbs-w4a16" + BLOCKS_ALONE), [f"weights.grid={grid}", "weights.scale_search=rms"])


def allocated(budget: float) -> dict[str, Recipe]:
    limit = f"weights: {budget}, sequences: 4, seq_len: 256"
    default = apply_settings(preset(HIGGS), [f"budget={{{limit}}}"])
    flat = [n for n in tables.names() if n[1] == "2"]
    base = apply_settings(default, [f"budget={{{limit}, grids: [{', '.join(flat)}, keep]}}"])
    every = [n for n in tables.names() if n[1] in "234"] + [n for n in grids.names() if n.startswith("e8")]
    mixed = apply_settings(base, [f"budget={{{limit}, grids: [{', '.join(every)}, keep]}}"])
    return {
        "unbiased p=2 + allocation": base,
        "unbiased p=1..4 + allocation": default,
        "unbiased p=2..4, e8 + allocation": mixed,
        "p=2 + allocation + gptq": _calibrated(base),
    }


def measure(experiment: Experiment, recipe: Recipe, slopes: Sensitivity) -> dict:
    found = experiment.quantize(recipe, slopes)
    grid = recipe.weights.grid.name if recipe.budget is None else "allocated"
    group = recipe.weights.group_size
    return found.row | {
        "setting": grid + (f" /{group}" if group else ""),
        "predicted": found.decision.predicted_loss,
        "rel_error": found.rel_errors(),
    }


def measure_hqq(experiment: Experiment, budget: float) -> dict | None:
    model = experiment.source.load()
    linears = [model.get_submodule(site.module) for site in experiment.source.sites.of("linear")]
    narrow = min(linear.in_features for linear in linears)
    fitting = [
        (bits, group)
        for bits in (2, 3, 4, 8)
        for group in (narrow, 128, 64, 32, 16)
        if bits + 32 / group <= budget + SLACK and all(m.weight.numel() % group == 0 for m in linears)
    ]
    if not fitting:
        return None
    bits, group = max(fitting, key=lambda f: (f[0], -f[1]))
    start = time.time()
    for linear in linears:
        q, meta = Quantizer.quantize(
            linear.weight.data, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        linear.weight.data = Quantizer.dequantize(q, meta).view_as(linear.weight).float()
    return evaluate(model, experiment.blocks.test, experiment.reference).to_dict() | {
        "bits": bits + 32 / group, "setting": f"{bits} bits /{group}", "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = Experiment.parser(__doc__, calibration=128, search=8, test=96)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    arguments = parser.parse_args()
    experiment = Experiment("weights", arguments)
    widths: dict[int, int] = {}
    for site in experiment.source.sites.of("linear"):
        widths[site.shape[1]] = widths.get(site.shape[1], 0) + site.numel
    problem = resolve(experiment.source, allocated(4)["unbiased p=2 + allocation"])
    slopes = measure_for(problem, None, Monitor(), "cpu")
    for nominal in map(float, arguments.bits.split(",")):
        budget = nominal + scale_bits(widths)
        for name, recipe in (*recipes(budget, widths), *allocated(budget).items()):
            experiment.row(f"{nominal:g} {name}", functools.partial(measure, experiment, recipe, slopes))
        if Quantizer is not None:
            experiment.row(f"{nominal:g} hqq", functools.partial(measure_hqq, experiment, budget))


if __name__ == "__main__":
    main()
