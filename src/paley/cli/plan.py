"""`paley plan`: decides what `paley quantize` would do, and writes it to a file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, peak_memory, shell

__all__ = ["plan_verb"]


@verb("plan")
def plan_verb(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", help="The plan's file.")] = Path("plan.json"),
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    grid: options.Grid = None,
    expand: options.Expand = None,
    seed: options.Seed = None,
    calibration: options.Calibration = None,
    test: options.Test = None,
    target_bpw: options.TargetBpws = None,
    target_size: options.TargetSize = None,
    kv_bpw: options.KvBpw = None,
    sensitivity: options.Sensitivity = None,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Decide only: search what to do to each layer, and write it to a JSON file.

    A plan has a line for each layer. Read it, change it, compare it with another, and execute it with
    `paley quantize MODEL --plan FILE`: the same plan on the same model gives the same bytes.

    With several budgets it only prints what each would cost: predicted loss against stored bits, nothing written.

    Example: `paley plan ./llama --preset w3a3kv3 --output plan.json`
    """
    from paley.cli import display
    from paley.cli.progress import watching
    from paley.cli.recipes import Request, numbers, slopes_of
    from paley.format.publish import check_file
    from paley.pipeline.any_model import check_device
    from paley.pipeline.curve import accuracy_size_curve

    start = time.monotonic()
    budgets = numbers(target_bpw)
    chosen = Request(
        preset=preset, recipe=recipe, settings=settings, calibration=calibration, test=test, expand=expand,
        seed=seed, grid=grid, target_bpw=budgets[0] if budgets else None, target_size=target_size,
        kv_bpw=kv_bpw,
    ).resolve()  # fmt: skip
    assert isinstance(chosen, paley.Recipe)
    slopes = slopes_of(sensitivity, chosen)
    if len(budgets) > 1:
        with watching() as monitor:
            curve = accuracy_size_curve(
                model, chosen, budgets, sensitivity=slopes, device=check_device(device), monitor=monitor
            )
        if as_json:
            display.emit({"model": model, "curve": [asdict(point) for point in curve]})
        else:
            display.show(display.curve_table(curve))
        return
    check_file(output, "the plan's file", overwrite=overwrite)
    with watching() as monitor:
        made = paley.make_plan(model, chosen, sensitivity=slopes, device=check_device(device), monitor=monitor)
    made.save(output)
    if as_json:
        cost = display.Cost(time.monotonic() - start, peak_memory())
        display.emit({"output": str(output), **asdict(cost), "plan": json.loads(made.to_json())})
        return
    display.show(display.plan_table(made))
    line(f"written to {output}")
    line(f"next: {shell('quantize', model, '--plan', str(output), '--output', 'OUT')}")
