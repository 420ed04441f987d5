"""Weight methods at equal stored bits, weights alone: writes benchmarks/results/weights-MODEL.json.

python benchmarks/weights.py MODEL [--bits 2,2.5,3,3.25,4.02,4.25] [--only RE]
For each budget, to which one float16 scale for each row (or 1024 columns of it) is added, every method gets the most
accurate setting that it has within it, all scales included: a row may fall short of its budget but never exceeds it by
more than 0.02 bits. Where a method has none, there is no row. hqq, if installed, runs on the same weights, its scales
and zeros counted as float16.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Iterator

import torch
from domain import MODELS, model_folder, texts
from quality import RESULTS, provenance

from paley.core import grids, tables
from paley.core.errors import PaleyError
from paley.core.packing import stored_bits
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.loading import Source, open_source
from paley.pipeline.accounting import parameter_count, quantized_bits
from paley.pipeline.monitor import Monitor
from paley.pipeline.sensitivities import measure_for
from paley.pipeline.stages import decide, execute
from paley.pipeline.texts import Texts
from paley.recipe import Recipe, apply_settings, preset
from paley.sensitivity import Sensitivity

try:
    from hqq.core.quantize import Quantizer
except ImportError:
    Quantizer = None

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
        ("gptq", "quarot-w4a16", ("rotate=false", "expand_mlp=0"), ("int",)),
        ("ours, w?a16", "w4a16", ("weights.scale_search=mse",), ("gauss",)),
    ):
        found = _best_grouped(budget, widths, families)
        if found is not None:
            grid, group = found
            size = "null" if group is None else group
            yield name, apply_settings(preset(base), [*settings, f"weights.grid={grid}", f"weights.group_size={size}"])
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
    return apply_settings(preset("higgs-2"), [f"weights.grid={grid}", f"weights.scale_search={scale_search}"])


def _calibrated(recipe: Recipe) -> Recipe:
    """With GPTQ in the rotated coordinates, and our compensation for what came before."""
    return apply_settings(recipe, ["weights.method=gptq"])


def _ours(grid: str) -> Recipe:
    """Our default for weights alone, on the same grid: rotations folded, GPTQ, the residual stream as its aim."""
    return apply_settings(preset("w4a16"), [f"weights.grid={grid}", "weights.scale_search=rms"])


def allocated(budget: float) -> dict[str, Recipe]:
    limit = f"weights: {budget}, sequences: 4, seq_len: 256"
    base = apply_settings(preset("higgs-2"), [f"budget={{{limit}}}"])
    every = [n for n in tables.names() if n[1] in "234"] + [n for n in grids.names() if n.startswith("e8")]
    mixed = apply_settings(base, [f"budget={{{limit}, grids: [{', '.join(every)}, keep]}}"])
    return {
        "unbiased p=2 + allocation": base,
        "unbiased p=2..4, e8 + allocation": mixed,
        "p=2 + allocation + gptq": _calibrated(base),
    }


def measure(source: Source, recipe: Recipe, blocks: Texts, reference: Reference, slopes: Sensitivity) -> dict:
    start = time.time()
    plan = decide(source, recipe, blocks, None, Monitor(), "cpu", slopes)
    model, reports = execute(source, plan, blocks, None, Monitor(), "cpu")
    grid = recipe.weights.grid if recipe.budget is None else "allocated"
    group = recipe.weights.group_size
    return evaluate(model, blocks.test, reference).to_dict() | {
        "bits": quantized_bits(plan, source), "setting": grid + (f" /{group}" if group else ""),
        "predicted": plan.predicted_loss,
        "rel_error": {r.name: r.rel_error for r in reports}, "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def measure_hqq(source: Source, budget: float, blocks: Texts, reference: Reference) -> dict | None:
    model = source.load()
    linears = {path: block.part(role) for block in Adapter(model).blocks for role, path in block.linears()}
    narrow = min(linear.in_features for linear in linears.values())
    fitting = [
        (bits, group)
        for bits in (2, 3, 4, 8)
        for group in (narrow, 128, 64, 32, 16)
        if bits + 32 / group <= budget + SLACK and all(m.weight.numel() % group == 0 for m in linears.values())
    ]
    if not fitting:
        return None
    bits, group = max(fitting, key=lambda f: (f[0], -f[1]))
    start = time.time()
    for linear in linears.values():
        q, meta = Quantizer.quantize(
            linear.weight.data, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        linear.weight.data = Quantizer.dequantize(q, meta).view_as(linear.weight).float()
    return evaluate(model, blocks.test, reference).to_dict() | {
        "bits": bits + 32 / group, "setting": f"{bits} bits /{group}", "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--only", default="", help="rows whose method this expression finds; others stay as they were")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--test", type=int, default=96)
    arguments = parser.parse_args()
    source = open_source(model_folder(arguments.model))
    blocks = texts(arguments.model, source.tokenizer(), calibration=arguments.calibration, search=8,
                   test=arguments.test)  # fmt: skip
    reference = Reference.of(source.load(), blocks.test)
    model = Adapter(source.skeleton())
    widths: dict[int, int] = {}
    for block in model.blocks:
        for role, _ in block.linears():
            linear = block.part(role)
            widths[linear.in_features] = widths.get(linear.in_features, 0) + linear.weight.numel()
    file = RESULTS / f"weights-{arguments.model}.json"
    rows = json.loads(file.read_text())["rows"] if arguments.only and file.exists() else {}
    result = {
        "model": arguments.model,
        "parameters": parameter_count(source),
        "sequences": {"calibration": arguments.calibration, "test": len(blocks.test.ids)},
        "test": blocks.test.source,
        **provenance(),
        "original_nll": float(reference.nll.double().mean()),
        "rows": rows,
    }
    slopes = measure_for(allocated(4)["unbiased p=2 + allocation"], source, None, Monitor(), "cpu")
    for nominal in map(float, arguments.bits.split(",")):
        budget = nominal + scale_bits(widths)
        work: dict[str, Callable[[], dict | None]] = {}
        for name, recipe in (*recipes(budget, widths), *allocated(budget).items()):
            work[name] = functools.partial(measure, source, recipe, blocks, reference, slopes)
        if Quantizer is not None:
            work["hqq"] = functools.partial(measure_hqq, source, budget, blocks, reference)
        for name, run in work.items():
            if not re.search(arguments.only, name):
                continue
            try:
                row = run()
            except PaleyError as error:  # a budget below a method's reach is a result too
                print(f"{nominal:g} {name}: {error}", flush=True)
                continue
            if row is None:
                continue
            result["rows"][f"{nominal:g} {name}"] = row | {"commit": result["commit"]}
            print(f"{nominal:5g} {name:30s} {row['setting']:14s} {row['bits']:.3f} bits  gap {row['gap']:.4f} ± "
                  f"{row['gap_stderr']:.4f}  KL {row['kl']:.4f} ± {row['kl_stderr']:.4f}  {row['seconds']} s",
                  flush=True)  # fmt: skip
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
