"""The verbs that make something of an original model: quantize, plan."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import paley
from paley.cli import display, options
from paley.cli.app import app
from paley.cli.process import STOPPED, how_to_resume, naming, peak_memory, say, shell
from paley.cli.progress import watching
from paley.cli.wish import Wish
from paley.cli.work import check_device, is_paley
from paley.core.errors import PaleyError
from paley.format.publish import check_file
from paley.pipeline.curve import accuracy_size_curve
from paley.pipeline.run_directory import RunDirectory
from paley.sensitivity import Sensitivity

__all__ = ["plan_verb", "quantize_verb"]


@app.command("quantize")
def quantize_verb(
    ctx: typer.Context,
    model: options.Model,
    output: options.NewFolder,
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    plan: options.PlanFile = None,
    settings: options.Settings = None,
    grid: options.Grid = None,
    expand: options.Expand = None,
    seed: options.Seed = None,
    calibration: options.Calibration = None,
    test: options.Test = None,
    no_score: options.NoScore = False,
    target_bpw: options.TargetBpw = None,
    target_size: options.TargetSize = None,
    kv_bpw: options.KvBpw = None,
    sensitivity: options.Sensitivity = None,
    device: options.Device = "cpu",
    workers: options.Workers = 1,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model: decide a plan, execute it, save, read back, and compare with the original.

    Say what to do by a preset, a recipe or a plan. The new folder appears when all of it is finished and
    verified; until then the work lies in OUT.run, and a stopped run goes on with --resume.

    Example: `paley quantize ./llama --preset w4a4kv4 --output llama-w4`
    """
    start = time.monotonic()
    budgets = _numbers(target_bpw)
    if len(budgets) > 1:
        raise PaleyError(
            f"--target-bpw {target_bpw}: one model takes one budget; `paley plan` compares several before you choose"
        )
    wish = Wish(
        preset, recipe, plan, tuple(settings or ()), calibration, test, expand, seed, grid, no_score,
        budgets[0] if budgets else None, target_size, kv_bpw,
    )  # fmt: skip
    chosen = wish.chosen()
    slopes = _slopes(sensitivity, chosen)
    decided = isinstance(chosen, paley.Plan)
    try:
        with naming(wish.options()), watching() as monitor:
            outcome = paley.quantize(
                model,
                None if decided else chosen,
                plan=chosen if decided else None,
                sensitivity=slopes,
                output=output,
                resume=resume,
                overwrite=overwrite,
                device=check_device(device),
                workers=workers,
                monitor=monitor,
            )
    except KeyboardInterrupt:
        say(how_to_resume(ctx, RunDirectory(output).path))
        raise typer.Exit(STOPPED) from None
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"output": str(outcome.output), **asdict(cost), "results": outcome.results})
        return
    display.show(display.outcome_table(outcome, cost))
    display.line(display.scored_on(outcome.results["evaluation"]))
    # With nothing quantized it is an ordinary model, which `inspect` refuses.
    layers = f"; each layer: {shell('inspect', str(outcome.output))}" if is_paley(outcome.output) else ""
    display.line(f"written to {outcome.output}{layers}")
    display.line(f"next: {shell('generate', str(outcome.output), 'Once upon a time')}")


def _numbers(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PaleyError(f"--target-bpw {text}: expected numbers with commas between them, such as 2.5,3,4") from None


def _slopes(file: Path | None, chosen: paley.Recipe | paley.Plan) -> Sensitivity | None:
    if file is None:
        return None
    if isinstance(chosen, paley.Plan) or chosen.budget is None:
        raise PaleyError("--sensitivity serves a budget: give --target-bpw, --target-size, --kv-bpw, or a recipe's own")
    return Sensitivity.load(file)


@app.command("plan")
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
    start = time.monotonic()
    budgets = _numbers(target_bpw)
    wish = Wish(
        preset, recipe, None, tuple(settings or ()), calibration, test, expand, seed, grid, False,
        budgets[0] if budgets else None, target_size, kv_bpw,
    )  # fmt: skip
    chosen = wish.chosen()
    assert isinstance(chosen, paley.Recipe)
    slopes = _slopes(sensitivity, chosen)
    if len(budgets) > 1:
        with naming(wish.options()), watching() as monitor:
            curve = accuracy_size_curve(
                model, chosen, budgets, sensitivity=slopes, device=check_device(device), monitor=monitor
            )
        if as_json:
            display.emit({"model": model, "curve": [asdict(point) for point in curve]})
        else:
            display.show(display.curve_table(curve))
        return
    check_file(output, "the plan's file", overwrite=overwrite)
    with naming(wish.options()), watching() as monitor:
        made = paley.make_plan(model, chosen, sensitivity=slopes, device=check_device(device), monitor=monitor)
    made.save(output)
    if as_json:
        cost = display.Cost(time.monotonic() - start, peak_memory())
        display.emit({"output": str(output), **asdict(cost), "plan": json.loads(made.to_json())})
        return
    display.show(display.plan_table(made))
    display.line(f"written to {output}")
    display.line(f"next: {shell('quantize', model, '--plan', str(output), '--output', 'OUT')}")
