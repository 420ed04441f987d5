"""Results as tables on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from paley.cli.process import line
from paley.core.schemes import ActivationScheme, WeightScheme
from paley.eval.figures import with_error
from paley.pipeline.monitor import duration
from paley.plan import Plan
from paley.recipe import Recipe
from paley.results import EvalResult

if TYPE_CHECKING:
    from paley.pipeline.curve import CurvePoint
    from paley.pipeline.estimate import Estimate
    from paley.pipeline.run import Outcome

__all__ = [
    "Cost",
    "Row",
    "clip",
    "curve_table",
    "emit",
    "estimate_table",
    "eval_table",
    "outcome_table",
    "plan_table",
    "presets_table",
    "scheme",
    "scored_on",
    "scores",
    "show",
    "size",
    "table",
]

Row = Sequence[str]


@dataclass(frozen=True)
class Cost:
    """What a verb took of the machine."""

    seconds: float
    peak_memory_bytes: int

    def rows(self) -> list[Row]:
        return [("seconds", "", f"{self.seconds:.1f}"), ("peak memory", "", size(self.peak_memory_bytes))]


def table(header: Row, rows: Iterable[Row], *, left: int = 1) -> Table:
    """Rows under a header (of empty strings: none shown); all but the first `left` columns to the right."""
    made = Table(box=box.SIMPLE_HEAD, show_header=any(header), pad_edge=False)
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def show(made: Table) -> None:
    """On a terminal as wide as it is; elsewhere as wide as the table."""
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False, markup=False)
    console.print(made)


def emit(found: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    line(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))


def scores(measured: EvalResult | None) -> list[Row]:
    """Rows of (what, original, quantized); none if nothing was measured."""
    if measured is None:
        return []
    m, original = measured, measured.reference_perplexity
    here = with_error(m.perplexity, m.perplexity_stderr, ".4f")
    if original is None or m.gap is None or m.kl is None or m.top1_agreement is None:
        return [("perplexity", "", here)]
    agreement = with_error(100 * m.top1_agreement, _percent(m.top1_stderr), ".2f")
    return [
        ("perplexity", f"{original:.4f}", here),
        ("loss gained, nats per token", "", with_error(m.gap, m.gap_stderr, "+.4f")),
        ("KL divergence, nats per token", "", with_error(m.kl, m.kl_stderr, ".4f")),
        ("same most likely token", "", f"{agreement} %"),
    ]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def size(count: float) -> str:
    """Bytes as a person reads them: '1.5 GiB'."""
    if count < 1024:
        return f"{count:.0f} bytes"
    units = ["KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log2(count)) // 10, len(units))
    return f"{count / 1024**power:.1f} {units[power - 1]}"


def scheme(made: WeightScheme | ActivationScheme | None, outliers: int = 0) -> str:
    """'int3 gptq /64 + 8': grid, method, group size, INT8 columns; '16 bits' where nothing is quantized."""
    if made is None:
        return "16 bits"
    method = f" {made.method}" if isinstance(made, WeightScheme) else " refit" if made.refit else ""
    groups, columns = made.group_size and f" /{made.group_size}", outliers and f" + {outliers}"
    return f"{made.grid.name}{method}{groups or ''}{columns or ''}"


def clip(made: ActivationScheme | None) -> str:
    """The clip ratio; with what it is a part of, where that is not the largest value."""
    if made is None:
        return ""
    return f"{made.clip_ratio:.3f}" + ("" if made.scale == "absmax" else f" {made.scale}")


def plan_table(plan: Plan) -> Table:
    """What a plan does, summed up."""
    recipe, rotation, linears = plan.recipe, plan.rotation, plan.linears.values()
    weights = _counted(scheme(slot.weight, slot.outliers) for slot in linears)
    rows: list[Row] = [
        ("weights", weights if recipe.budget is None else _shares(_grids(plan))),
        ("linear inputs", _counted(scheme(slot.input) for slot in linears)),
        ("keys", _counted(scheme(attention.keys) for attention in plan.attentions.values())),
        ("values", _counted(scheme(attention.values) for attention in plan.attentions.values())),
    ]
    for name, transform in asdict(rotation).items() if rotation is not None else ():
        if transform is not None:
            narrow, wide = transform["in_dim"], transform["out_dim"]
            widened = f"{narrow} → {wide}, " if wide > narrow else ""
            rows.append((f"rotation: {name}", f"{widened}Hadamard blocks of {transform['order']}"))
    quantized = sum(slot.weight is not None for slot in plan.linears.values())
    rows.append(("linear layers", f"{quantized} of {len(plan.linears)} quantized"))
    found = [s.clip_ratio for s in _activations(plan)]
    if found:
        rows.append(("clip ratios", f"{min(found):.3f} to {max(found):.3f} in {len(found)} places"))
    if plan.trace:
        rows.append(("trials of the search", str(len(plan.trace))))
    if plan.predicted_loss is not None:
        what = f"{recipe.search.objective} on the search text" if plan.trace else "predicted loss, by the slopes"
        rows.append((what, f"{plan.predicted_loss:.4f}"))
    return table(("", ""), rows, left=2)


def _grids(plan: Plan) -> dict[str, int]:
    """How many linears have each grid, the most frequent first."""
    found = Counter("16 bits" if slot.weight is None else slot.weight.grid.name for slot in plan.linears.values())
    return dict(found.most_common())


def _counted(schemes: Iterable[str]) -> str:
    """What is really in the slots, the most frequent first."""
    found = dict(Counter(schemes).most_common())
    return _shares(found) if len(found) > 1 else "".join(found)


def _shares(grids: dict[str, int]) -> str:
    return "  ".join(f"{grid} × {count}" for grid, count in grids.items())


def _activations(plan: Plan) -> list[ActivationScheme]:
    found = [slot.input for slot in plan.linears.values()]
    for slot in plan.attentions.values():
        found += [slot.keys, slot.values]
    return [made for made in found if made is not None]


def presets_table(recipes: dict[str, Recipe]) -> Table:
    """Name -> recipe, a row each."""
    rows = []
    for name, r in recipes.items():
        inputs, caches = f"{scheme(r.inputs)} {clip(r.inputs)}", f"{scheme(r.keys)} {clip(r.keys)}"
        rows.append((name, scheme(r.weights, r.outliers), inputs, caches, r.rotation, r.search.method))
    return table(("preset", "weights", "inputs, clip", "KV cache, clip", "rotated", "search"), rows, left=6)


def outcome_table(outcome: Outcome, cost: Cost) -> Table:
    """A run's original and quantized model side by side."""
    results = outcome.results
    measured, bits = results.evaluation, results.bits_per_weight
    ratio, layers = results.original_bytes / results.bytes, results.bits_per_quantized_weight
    rows = [
        *scores(measured),
        ("bits per weight, all tensors", f"{bits * ratio:.3f}", f"{bits:.3f}"),
        *([("bits per weight, quantized layers", "", f"{layers:.3f}")] if layers is not None else []),
        ("bytes on disk", f"{results.original_bytes:,}", f"{results.bytes:,}"),
        *([_cache_row(measured)] if measured else []),
        *cost.rows(),
    ]
    return table(("", "original", "quantized"), rows)


def estimate_table(estimate: Estimate, free: int | None) -> Table:
    """What a run would take, stage by stage; free: bytes of memory."""
    rows = [(name, duration(seconds)) for name, seconds in estimate.stages.items()]
    rows += [
        ("in all, about", duration(estimate.seconds)),
        ("peak memory, about", size(estimate.memory)),
        *([("memory free now", size(free))] if free is not None else []),
        ("bytes on disk", f"{estimate.bytes:,}"),
        *([("bytes beside it until it is done", f"{estimate.states:,}")] if estimate.states else []),
        ("bytes of the original", f"{estimate.original_bytes:,}"),
    ]
    return table(("", ""), rows)


def curve_table(curve: Sequence[CurvePoint]) -> Table:
    """Budgets and what they cost in accuracy."""
    rows = [
        (
            f"{point.budget:g}",
            f"{point.bits_per_weight:.3f}",
            f"{point.predicted_loss:.5f}",
            _shares(point.grids),
        )
        for point in curve
    ]
    made = table(("bits allowed", "used", "predicted loss", "grids"), rows, left=0)
    made.columns[-1].justify = "left"
    return made


def eval_table(measured: EvalResult, cost: Cost) -> Table:
    """Scores, beside the original's if it was measured."""
    rows = [*scores(measured), _cache_row(measured), *cost.rows()]
    if measured.reference_nll is None:
        return table(("", ""), [(what, here) for what, _, here in rows])
    return table(("", "original", "this model"), rows)


def _cache_row(measured: EvalResult) -> Row:
    """The original's cache has 16 bits a value."""
    original, here = measured.kv_cache_bytes_per_token_at_16_bits, measured.kv_cache_bytes_per_token
    return "KV cache, bytes per token", f"{original:,.0f}", f"{here:,.0f}"


def scored_on(measured: EvalResult | None) -> str:
    """The text behind the scores."""
    if measured is None:
        return "not scored: the recipe has no test text; `paley eval OUT --against MODEL` measures what was lost"
    return f"scored on {measured.tokens:,} tokens in {measured.sequences} sequences of {measured.source}"
