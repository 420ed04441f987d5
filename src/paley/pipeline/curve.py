"""What each budget would cost in accuracy, without quantizing anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paley.core.errors import PaleyError, Setting
from paley.model.budget import check_budget, fed_back
from paley.model.loading import open_source
from paley.model.problem import Problem
from paley.pipeline.accounting import quantized_bits
from paley.pipeline.decide import Decision, as_quantized, decide_under_budget, measure_errors_for
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import measure_for
from paley.pipeline.texts import fit_lengths, gather
from paley.recipe import Recipe
from paley.sensitivity import Sensitivity

__all__ = ["CurvePoint", "accuracy_size_curve"]


@dataclass(frozen=True)
class CurvePoint:
    """A budget in bits per weight, what of it is used, the predicted gain of the loss, and how often each grid is."""

    budget: float
    bits_per_weight: float
    predicted_loss: float
    grids: dict[str, int]


def accuracy_size_curve(
    model: str | Path,
    recipe: Recipe,
    budgets: Sequence[float],
    *,
    sensitivity: Sensitivity | None = None,
    device: str = "cpu",
    monitor: Monitor | None = None,
) -> list[CurvePoint]:
    """The optimum under each of the budgets, in stored bits per weight, everything else as the recipe says."""
    if recipe.budget is None:
        raise PaleyError("curve: the recipe has no budget to vary", remedy=("give it ", Setting("budget.weights")))
    if odd := [bits for bits in budgets if not math.isfinite(bits)]:
        raise PaleyError(Setting("budget.weights"), ": must be a finite number", got=odd[0])
    monitor, source = monitor or Monitor(), open_source(model)
    if recipe.test is not None and recipe.test.source is None:  # one of its own decides what is left to calibrate on
        recipe = recipe.model_copy(update={"test": None})
    recipe = fit_lengths(recipe, source, monitor, measures=sensitivity is None)
    problem = resolve(source, recipe)
    problems = {bits: _under(problem, bits) for bits in budgets}
    for each in problems.values():
        check_budget(each)
    if sensitivity is None:
        sensitivity = measure_for(problem, None, monitor, device)
    sensitivity.check_fingerprint(source.fingerprint)
    errors = measure_errors_for(problem, sensitivity, monitor, device) if problems else None
    if problems:
        calibration = gather(recipe, source, device, monitor).calibration if fed_back(problem) else None
        sensitivity = as_quantized(problem, sensitivity, calibration, monitor, device)
    for note in problem.notes:
        monitor.note(note)
    points, notes = [], _Notes()
    for bits, each in problems.items():
        notes.bits = bits
        points.append(_point(bits, each, decide_under_budget(each, sensitivity, errors, notes)))
    for text, of in notes.heard.items():
        monitor.note(text if len(of) == len(points) else f"{text} ({', '.join(f'{bits:g}' for bits in of)})")
    return points


def _under(problem: Problem, bits: float) -> Problem:
    assert problem.budget is not None
    return replace(problem, budget=problem.budget.model_copy(update={"weights": bits}))


class _Notes(Monitor):
    """Keeps each note with the budgets that it is about, so that it is given once."""

    def __init__(self) -> None:
        self.bits = 0.0
        self.heard: dict[str, list[float]] = {}

    def note(self, text: str) -> None:
        self.heard.setdefault(text, []).append(self.bits)


def _point(budget: float, problem: Problem, decision: Decision) -> CurvePoint:
    bits = quantized_bits(problem.with_schemes(decision.schemes))
    assert bits is not None
    assert decision.predicted_loss is not None
    linears = decision.schemes.linears.values()
    used = Counter("keep" if scheme.weight is None else scheme.weight.grid.name for scheme in linears)
    return CurvePoint(budget, bits, decision.predicted_loss, dict(used.most_common()))
