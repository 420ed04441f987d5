"""Decide a plan for a model, and execute one. Searches only decide; quantizing only executes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.core.rounding import Quantized
from paley.format import spec
from paley.format.checkpoint import read_tensors
from paley.format.dtypes import FLOATS, cast_to_store
from paley.format.writer import write_tensors
from paley.methods.gbs import Outcome
from paley.model.activation_errors import MeasuredErrors, measure_errors
from paley.model.adapter import Adapter, Block
from paley.model.budget import Slots, activation_schemes, check_budget, decide_grids, range_note
from paley.model.calibrate import BlockQuantizer, LayerReport, wrap_
from paley.model.capture import BlockRunner
from paley.model.fold import rotate_input_
from paley.model.loading import Source
from paley.model.rotation import decide_rotation, rotate_
from paley.model.search import ClipSearch
from paley.pipeline.monitor import Monitor
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.sensitivities import measure_for, some_blocks
from paley.pipeline.slots import check_plan, fitted_groups, slots_for
from paley.pipeline.texts import Texts
from paley.plan import Plan, Trial
from paley.recipe import Recipe
from paley.sensitivity import Sensitivity

__all__ = ["decide", "execute", "measure_errors_for", "prepare_", "storage_dtype"]


def decide(
    source: Source,
    recipe: Recipe,
    texts: Texts,
    run: RunDirectory | None,
    monitor: Monitor,
    device: str,
    sensitivity: Sensitivity | None = None,
    errors: MeasuredErrors | None = None,
) -> Plan:
    """What to do to each slot of the model: the recipe's schemes, with grids allocated and clip ratios searched where
    it says so. sensitivity, errors: what grids are allocated by; measured now unless given.

    The search sees weights quantized under the recipe's own clip ratios; executing the plan calibrates them
    anew under the found ones.
    """
    searches = recipe.search.method != "none"
    adapter = Adapter(source.skeleton())
    rotation = decide_rotation(recipe, adapter)
    linears, attentions = slots_for(recipe, adapter, rotation)
    if text := fitted_groups(recipe, adapter, rotation):
        monitor.note(f"fit_groups: {text}")
    predicted = None
    if recipe.budget is not None:
        slots = Slots(linears, attentions)
        check_budget(recipe, adapter, slots)
        sensitivity = sensitivity or measure_for(recipe, source, run, monitor, device)
        sensitivity.check_fingerprint(source.fingerprint)
        if not recipe.rotate and recipe.hadamard is None:
            monitor.note("budget: the prediction counts on Gaussian weights, but nothing is rotated to make them so")
        errors = errors or measure_errors_for(recipe, source, sensitivity, monitor, device)
        slots, allocation = decide_grids(recipe, adapter, slots, sensitivity, errors)
        linears, attentions, predicted = slots.linears, slots.attentions, allocation.loss
        if text := range_note(recipe, adapter, slots):
            monitor.note(text)
    plan = Plan(
        fingerprint=source.fingerprint, model_type=source.config.model_type, recipe=recipe, rotation=rotation,
        linears=linears, attentions=attentions, predicted_loss=predicted,
    )  # fmt: skip
    if not searches:
        return plan
    assert texts.search is not None
    adapter = Adapter(source.load(device=device))
    ids = texts.search.ids.to(device)
    runner = BlockRunner(adapter)
    prepare_(source, adapter, plan)
    reference = runner.suffix(0, runner.embed(ids))
    _quantize_blocks(runner, plan, texts, run, "draft", monitor)
    search = ClipSearch(runner, ids, reference, linears, attentions, recipe.search)
    monitor.stage("searching clip ratios", len(search.slots))
    trace = list(run.trials()) if run else []
    slot_losses: dict[str, float] = {}

    def on_trial(trial: Trial) -> None:
        trace.append(trial)
        if run:
            run.add_trial(trial)

    def on_slot(name: str, outcome: Outcome) -> None:
        slot_losses[name] = outcome.loss
        monitor.step(f"{name}  clip {outcome.clip_ratio:.3f}  {recipe.search.objective} {outcome.loss:.4f}")

    search.run(trace.copy(), on_trial, on_slot)
    return plan.model_copy(
        update={
            "linears": search.linears,
            "attentions": search.attentions,
            "trace": tuple(trace),
            "predicted_loss": list(slot_losses.values())[-1] if slot_losses else None,
        }
    )


def measure_errors_for(
    recipe: Recipe, source: Source, sensitivity: Sensitivity, monitor: Monitor, device: str
) -> MeasuredErrors | None:
    """What rounding loses of the keys, values and inputs whose grids the recipe's budget decides; None without any."""
    skeleton = Adapter(source.skeleton())
    rotation = decide_rotation(recipe, skeleton)
    linears, attentions = slots_for(recipe, skeleton, rotation)
    slots = Slots(linears, attentions)
    check_budget(recipe, skeleton, slots, sensitivity)
    if not (schemes := activation_schemes(recipe, skeleton, slots)):
        return None
    monitor.stage("measuring what rounding loses of keys, values and inputs", 1)
    blocks = some_blocks(recipe, source, sensitivity, monitor, device)
    adapter = Adapter(source.load(device=device))
    plan = Plan(
        fingerprint=source.fingerprint, model_type=source.config.model_type, recipe=recipe, rotation=rotation,
        linears=linears, attentions=attentions,
    )  # fmt: skip
    prepare_(source, adapter, plan)
    found = measure_errors(adapter, blocks.ids.to(device), linears, attentions, schemes)
    monitor.step()
    return found


def execute(
    source: Source, plan: Plan, texts: Texts, run: RunDirectory | None, monitor: Monitor, device: str
) -> tuple[PreTrainedModel, list[LayerReport]]:
    """-> the quantized model, ready to run or to save, and a report for each quantized layer."""
    plan.check_fingerprint(source.fingerprint)
    adapter = Adapter(source.load(device=device))
    check_plan(plan, adapter)
    prepare_(source, adapter, plan)
    reports = _quantize_blocks(BlockRunner(adapter), plan, texts, run, "final", monitor)
    return adapter.model, reports


def storage_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """The type of tensors that stay unquantized: the checkpoint's own 16-bit type, or float16."""
    if recipe.dtype != "auto":
        return FLOATS[recipe.dtype]
    own = getattr(source.config, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.float16


def prepare_(source: Source, adapter: Adapter, plan: Plan) -> None:
    """Rotates the model, rounds what stays unquantized to its storage type, and wraps the linears."""
    rotate_(adapter, plan.rotation)
    if plan.recipe.hadamard is not None:
        for block in adapter.blocks:
            for role, path in block.linears():
                if (transform := plan.linears[path].transform) is not None:
                    rotate_input_(block.part(role), transform)
    dtype = storage_dtype(plan.recipe, source)
    quantized = {f"{name}.weight" for name, slot in plan.linears.items() if slot.weight is not None}
    for name, parameter in adapter.model.named_parameters():
        if name in quantized:
            continue
        parameter.data = cast_to_store(name, parameter.data, dtype).to(parameter.dtype)
    wrap_(adapter, plan.linears, plan.attentions)


def _quantize_blocks(
    runner: BlockRunner, plan: Plan, texts: Texts, run: RunDirectory | None, stage: str, monitor: Monitor
) -> list[LayerReport]:
    """Every block in turn; one that the run directory holds already is taken from there."""
    calibration = texts.calibration.ids.to(runner.adapter.model.device) if texts.calibration is not None else None
    quantizer = BlockQuantizer(
        runner, calibration, plan.linears, plan.attentions,
        compensate=plan.recipe.compensate,
    )  # fmt: skip
    count = sum(slot.weight is not None for slot in plan.linears.values())
    monitor.stage("quantizing weights" if stage == "final" else "quantizing weights for the search", count)
    reports: list[LayerReport] = []

    def show(report: LayerReport) -> None:
        monitor.step(f"{report.name}  rel_error {report.rel_error:.4f}")

    for block in runner.adapter.blocks:
        file = run.block_file(stage, block.index) if run else None
        if file is not None and file.exists():
            restored = quantizer.restore(block.index, *_read_block(file, plan, block), show)
            reports += [replace(report, quantized=None) for report in restored]
            continue
        done = quantizer.quantize(block.index, show)
        if file is not None:
            _write_block(file, block, done)
        reports += [replace(report, quantized=None) for report in done]
    return reports


def _write_block(file: Path, block: Block, reports: list[LayerReport]) -> None:
    tensors: dict[str, Tensor] = {}
    for report in reports:
        assert report.quantized is not None
        tensors |= spec.encode_linear(report.name, report.quantized)
    if (mean := block.part("attention").key_mean) is not None:
        tensors[_key_mean(block)] = mean
    write_tensors(file, tensors)


def _read_block(file: Path, plan: Plan, block: Block) -> tuple[dict[str, Quantized], Tensor | None]:
    tensors = read_tensors(file)
    quantized = {
        path: spec.decode_linear(path, tensors, plan.linears[path], block.part(role).in_features)
        for role, path in block.linears()
        if plan.linears[path].weight is not None
    }
    return quantized, tensors.get(_key_mean(block))


def _key_mean(block: Block) -> str:
    return f"{block.path('attention')}.key_mean"
