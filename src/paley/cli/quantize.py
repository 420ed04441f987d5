"""`paley quantize`: an original model becomes a quantized folder."""

from __future__ import annotations

import time
from dataclasses import asdict

import typer

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import STOPPED, how_to_resume, line, peak_memory, say, shell
from paley.core.errors import PaleyError

__all__ = ["quantize_verb"]


@verb("quantize")
def quantize_verb(
    ctx: typer.Context,
    model: options.Model,
    output: options.NewFolderOrNone = None,
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    plan: options.PlanFile = None,
    base: options.Base = None,
    exact: options.Exact = False,
    settings: options.Settings = None,
    tune: options.Tune = False,
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
    ray: options.Ray = False,
    ray_address: options.RayAddress = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model: decide a plan, execute it, save, read back, and compare with the original.

    Say what to do by a preset, a recipe or a plan. With --from OUT the weights of an earlier folder are kept wherever
    their scheme stays the same, and its recipe is taken unless one is named. The new folder appears when all of it is
    finished and verified; until then the work lies in OUT.run, and a stopped run goes on with --resume.

    Example: `paley quantize ./llama --preset w4a4kv4 --output llama-w4`
    """
    from paley.cli import display
    from paley.cli.progress import watching
    from paley.cli.recipes import Request, numbers, slopes_of
    from paley.pipeline.any_model import check_device, is_paley
    from paley.pipeline.machine import free_memory
    from paley.pipeline.reuse import Base
    from paley.pipeline.run_directory import RunDirectory

    start = time.monotonic()
    budgets = numbers(target_bpw)
    if len(budgets) > 1:
        raise PaleyError(
            f"--target-bpw {target_bpw}: one model takes one budget; `paley plan` compares several before you choose"
        )
    chosen = Request(
        preset=preset, recipe=recipe, plan=plan, base=base, settings=settings, calibration=calibration, test=test,
        expand=expand, seed=seed, grid=grid, no_score=no_score, tune=tune,
        target_bpw=budgets[0] if budgets else None,
        target_size=target_size, kv_bpw=kv_bpw,
    ).resolve()  # fmt: skip
    slopes = slopes_of(sensitivity, chosen)
    decided = isinstance(chosen, paley.Plan)
    earlier = Base.asked_for(base, exact)
    if dry_run:
        found = paley.estimate(model, None if decided else chosen, plan=chosen if decided else None, sensitivity=slopes)
        if as_json:
            display.emit({"model": model, **asdict(found), "seconds": found.seconds})
        else:
            display.show(display.estimate_table(found, free_memory()))
            if earlier is not None:
                line(f"the time is that of all weights; those that are kept from {base} take none")
        return
    assert output is not None  # options.NewFolderOrNone
    try:
        with watching() as monitor:
            outcome = paley.quantize(
                model,
                None if decided else chosen,
                plan=chosen if decided else None,
                sensitivity=slopes,
                base=base,
                exact=exact,
                output=output,
                resume=resume,
                overwrite=overwrite,
                device=check_device(device),
                workers=workers,
                ray=options.cluster(ray, ray_address),
                monitor=monitor,
            )
    except KeyboardInterrupt:
        say(how_to_resume(ctx, RunDirectory(output).path))
        raise typer.Exit(STOPPED) from None
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"output": str(outcome.output), **asdict(cost), "results": outcome.results.to_dict()})
        return
    display.show(display.outcome_table(outcome, cost))
    if (kept := outcome.results.kept) is not None:
        what = "bytes" if outcome.plan.recipe.tune is None else "codes"
        line(f"kept from {base}: {kept.weights} weights, the same {what}"
             + (f", {kept.fitted} of them fitted to layers as they were there" if kept.fitted else ""))  # fmt: skip
    line(display.scored_on(outcome.results.evaluation))
    # With nothing quantized it is an ordinary model, which `inspect` refuses.
    layers = f"; each layer: {shell('inspect', str(outcome.output))}" if is_paley(outcome.output) else ""
    line(f"written to {outcome.output}{layers}")
    if layers:
        line(f"where its bytes and errors are: {shell('report', str(outcome.output), '--against', model)}")
    line(f"next: {shell('generate', str(outcome.output), 'Once upon a time')}")
