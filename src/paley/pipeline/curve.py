"""What each budget would cost in accuracy, without quantizing anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paley.core.errors import PaleyError, Setting
from paley.model.loading import Source, check_seq_len, open_source
from paley.pipeline.accounting import quantized_bits
from paley.pipeline.monitor import Monitor
from paley.pipeline.sensitivities import measure_for
from paley.pipeline.slots import check_settings
from paley.pipeline.stages import decide, measure_errors_for
from paley.pipeline.texts import Texts
from paley.plan import Plan
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
    unsearched = recipe.model_copy(update={"search": recipe.search.model_copy(update={"method": "none"})})
    wanted = {
        bits: unsearched.model_copy(update={"budget": recipe.budget.model_copy(update={"weights": bits})})
        for bits in budgets
    }
    for each in wanted.values():
        check_settings(source, each)
    if sensitivity is None:
        check_seq_len(source.config, {"budget.seq_len": recipe.budget.seq_len})
        sensitivity = measure_for(recipe, source, None, monitor, device)
    sensitivity.check_fingerprint(source.fingerprint)
    errors = measure_errors_for(next(iter(wanted.values())), source, sensitivity, monitor, device) if wanted else None
    points, notes = [], _Notes()
    for bits, each in wanted.items():
        notes.bits = bits
        plan = decide(source, each, Texts(None, None, None), None, notes, device, sensitivity, errors)
        points.append(_point(bits, plan, source))
    for text, of in notes.heard.items():
        monitor.note(text if len(of) == len(points) else f"{text} ({', '.join(f'{bits:g}' for bits in of)})")
    return points


class _Notes(Monitor):
    """Keeps each note with the budgets that it is about, so that it is given once."""

    def __init__(self) -> None:
        self.bits = 0.0
        self.heard: dict[str, list[float]] = {}

    def note(self, text: str) -> None:
        self.heard.setdefault(text, []).append(self.bits)


def _point(budget: float, plan: Plan, source: Source) -> CurvePoint:
    bits = quantized_bits(plan, source)
    assert bits is not None
    assert plan.predicted_loss is not None
    used = Counter("keep" if slot.weight is None else slot.weight.grid for slot in plan.linears.values())
    return CurvePoint(budget, bits, plan.predicted_loss, dict(used.most_common()))
