"""`paley sensitivity`: measures how much each layer of the original model matters."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import STOPPED, how_to_resume, line, peak_memory, say, shell
from paley.core.defaults import LEVELS, SELF
from paley.core.errors import PaleyError

if TYPE_CHECKING:
    from paley.cli.display import Cost
    from paley.sensitivity import MeasuredSlot, Sensitivity

__all__ = ["sensitivity_verb"]

_SHOWN = 10


@verb("sensitivity")
def sensitivity_verb(
    ctx: typer.Context,
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", help="The file.")] = Path("alpha.json"),
    metric: Annotated[
        Literal["kl", "perplexity"], typer.Option("--metric", help="What noise is judged by: KL to the model as it is.")
    ] = "kl",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="SOURCE|random",
            help="self (sampled), a file, pydoc, hub:DATASET[:CONFIG][:SPLIT], or random tokens (kl only).",
        ),
    ] = SELF,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="How many sequences.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens of each: 512, or what the model reads.")
    ] = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="Also the linear layers' inputs, keys and values.")
    ] = False,
    fold: Annotated[
        bool, typer.Option(help="Measure with the norms' gains in the weights, as recipes that rotate have it.")
    ] = False,
    method: Annotated[
        Literal["gradients", "noise"] | None,
        typer.Option("--method", help="gradients: minutes, for kl alone, the default there; noise: hours."),
    ] = None,
    levels: Annotated[int, typer.Option("--levels", help="Noise levels of a slot, at most.")] = LEVELS,
    seed: Annotated[int, typer.Option("--seed", help="Draws the noise, and the text's order.")] = 0,
    device: options.Device = "cpu",
    workers: options.Workers = 1,
    ray: options.Ray = False,
    ray_address: options.RayAddress = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Measure how much each layer matters: what noise in it adds to the model's loss, per relative squared error.

    The slopes belong to the model and serve every budget of `paley quantize`. With --method noise, finished trials are
    kept in OUT.partial.jsonl until all are there, and a stopped run goes on with --resume; with --workers or --ray they
    are shared: each worker uses one thread, and holds a block of the model, or with --fold all of it.

    Example: `paley sensitivity ./llama --output alpha.json`
    """
    from paley.cli import display
    from paley.cli.progress import watching
    from paley.format.publish import check_file, unfinished
    from paley.methods.sensitivity import method_for
    from paley.model.sensitivity import KINDS
    from paley.pipeline.any_model import check_device
    from paley.pipeline.sensitivities import measure_sensitivity

    start = time.monotonic()
    partial = Path(f"{output}.partial.jsonl")
    check_file(output, "the file for the sensitivities", overwrite=overwrite or (resume and partial.exists()))
    if partial.exists() and not (resume or overwrite):
        raise unfinished(partial, "measurement")
    if partial.exists() and not overwrite and (method or method_for(metric)) == "gradients":
        raise PaleyError(f"{partial}: has finished trials of noise", remedy="go on with --method noise, or --overwrite")
    device = check_device(device)
    if overwrite and not resume:
        partial.unlink(missing_ok=True)
    try:
        with watching() as monitor:
            found = measure_sensitivity(
                model, metric=metric, source=text, sequences=sequences, seq_len=seq_len,
                kinds=KINDS if activations else ("weight",), fold=fold, method=method, levels=levels, seed=seed,
                device=device, workers=workers, ray=options.cluster(ray, ray_address), monitor=monitor,
                progress_file=partial,
            )  # fmt: skip
    except KeyboardInterrupt:
        say(how_to_resume(ctx, partial))
        raise typer.Exit(STOPPED) from None
    found.save(output)
    partial.unlink(missing_ok=True)
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"output": str(output), **asdict(cost), "sensitivity": json.loads(found.to_json())})
        return
    _show(found, cost)
    line(f"written to {output}")
    # The plain --target-bpw quantizes the weights as they are; recipes that rotate fold.
    recipe = ["--preset", "w3a16"] if fold else []
    budget = [*recipe, "--target-bpw", "3.25", "--sensitivity", str(output), *_short_test(model)]
    line(f"next: {shell('quantize', model, *budget, '--output', 'OUT')}")


def _short_test(model: str) -> list[str]:
    """The setting that a model needs which reads fewer tokens than a test's sequences have."""
    from paley.model.folders import resolve
    from paley.model.loading import context_of, read_config
    from paley.recipe import Test

    limit = context_of(read_config(resolve(model)))
    return ["--set", f"test.seq_len={limit}"] if limit is not None and limit < Test().seq_len else []


def _show(found: Sensitivity, cost: Cost) -> None:
    """Tables on stdout: the steepest slots, means by type, and what it took."""
    from paley.cli import display
    from paley.eval.figures import with_error

    steepest = sorted(found.slots.items(), key=lambda item: -item[1].alpha)
    rows = [
        (name, slot.kind, with_error(slot.alpha, slot.stderr, ".4g"), f"{len(slot.levels) or ''}")
        for name, slot in steepest[:_SHOWN]
    ]
    display.show(display.table((f"largest of {len(steepest)} slopes", "", "alpha", "levels"), rows, left=2))
    types: dict[str, list[MeasuredSlot]] = {}
    for name, slot in found.slots.items():
        types.setdefault(name.rpartition(".")[2].removesuffix("_proj"), []).append(slot)
    means = {kind: statistics.mean(slot.alpha for slot in slots) for kind, slots in types.items()}
    ordered = sorted(means.items(), key=lambda item: -item[1])
    display.show(display.table(("type", "mean alpha"), [(kind, f"{mean:.4g}") for kind, mean in ordered]))
    clamped = sum(slot.clamped for slot in found.slots.values())
    if clamped:
        line(f"{clamped} slopes were not positive and were set to a small number (clamped in the file)")
    display.show(display.table(("", ""), [(what, here) for what, _, here in cost.rows()]))
    unit = "KL, nats a token" if found.metric == "kl" else f"perplexity, {found.baseline:.4f} without noise"
    line(f"{unit}, on {found.text.tokens:,} tokens of {found.text.source}; it grows by alpha · t²")
