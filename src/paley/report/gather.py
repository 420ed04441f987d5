"""Collects what a folder's files, and measurements beside the original, say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paley
from paley.core.reading import read_json
from paley.eval.figures import with_error
from paley.pipeline.inspect import Inspection, inspect
from paley.pipeline.monitor import Monitor
from paley.plan import VERSION, Plan
from paley.recipe import under_budget
from paley.report import figures
from paley.report.figures import Figure
from paley.report.making import Making, making
from paley.report.measured import Measured
from paley.report.speed import SpeedFile, speeds
from paley.sensitivity import Sensitivity

if TYPE_CHECKING:
    from paley.report.measure import Original

__all__ = ["Report", "as_data", "gather"]

_BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class Report:
    """facts: (what, value) rows; not_scored: what to run if there are no scores; made: how the folder was made."""

    name: str
    facts: tuple[tuple[str, str], ...]
    not_scored: str
    figures: tuple[Figure, ...]
    measured: Measured | None
    made: Making

    def figure(self, name: str) -> Figure:
        """The one with this id."""
        return next(figure for figure in self.figures if figure.id == name)


def gather(
    folder: str | Path, against: str | Path | Original | None = None, *, sensitivity: str | Path | None = None,
    speed: str | Path | None = None, data: str | None = None, monitor: Monitor | None = None,
) -> Report:  # fmt: skip
    """The report of a quantized folder; against: its original, for what is measured token by token; an
    `Original` is measured once for several folders.

    sensitivity: a file that `paley.measure_sensitivity` gave. speed: one that `paley bench OUT --json` printed into.
    data: the text, as of `paley.score`.
    """
    monitor, folder = monitor or Monitor(), Path(folder)
    name = folder.resolve().name
    inspection, plan = inspect(folder), _plan(folder / "plan.json")
    measured_speed = None if speed is None else SpeedFile.load(Path(speed), folder)
    slopes = None if sensitivity is None else Sensitivity.load(Path(sensitivity))
    if slopes is not None and plan is not None:
        slopes.check_fingerprint(plan.fingerprint)
    measured, curve = None, list[tuple[float, float]]()
    if against is not None:
        from paley.report.measure import Original, measure  # seconds of imports, for this alone

        original = against if isinstance(against, Original) else Original(against)
        measured = measure(folder, original, data, monitor)
        curve = [] if slopes is None else _curve(original.path, slopes, monitor)
    drawn = [
        figures.sizes(inspection), figures.bits_map(inspection), figures.errors(inspection),
        figures.positions(measured), figures.losses(measured), figures.outliers(measured),
        figures.search_trace(plan), figures.clips(inspection), *figures.slopes(inspection, slopes, curve),
        speeds(measured_speed, name),
    ]  # fmt: skip
    return Report(
        name=name,
        facts=tuple(_facts(inspection, plan)),
        not_scored="" if inspection.results is not None and inspection.results.evaluation is not None else
        f"This model was never scored; `paley eval {name} --against ORIGINAL` does it.",
        figures=tuple(drawn),
        measured=measured,
        made=making(inspection, plan),
    )  # fmt: skip


def _curve(original: str | Path, slopes: Sensitivity, monitor: Monitor) -> list[tuple[float, float]]:
    """(bits a weight, predicted loss) of some budgets."""
    from paley.pipeline.curve import accuracy_size_curve

    recipe = under_budget(weights=_BUDGETS[0]).model_copy(update={"test": None})
    found = accuracy_size_curve(original, recipe, _BUDGETS, sensitivity=slopes, monitor=monitor)
    return [(point.bits_per_weight, point.predicted_loss) for point in found]


def _plan(file: Path) -> Plan | None:
    """None if there is none, or one of an older Paley."""
    if not file.is_file() or read_json(file).get("version") != VERSION:
        return None
    return Plan.load(file)


def _facts(inspection: Inspection, plan: Plan | None) -> list[tuple[str, str]]:
    results = inspection.results
    facts: list[tuple[str, str]] = [("architecture", str(inspection.model_type))]
    facts.append(("bytes, all tensors", f"{inspection.bytes:,}"))
    if results is not None:
        facts.append(("bytes of the original", f"{results.original_bytes:,}"))
        facts.append(("bits a weight, every stored byte counted", f"{results.bits_per_weight:.3f}"))
        if (m := results.evaluation) is not None:
            facts.append(("perplexity", with_error(m.perplexity, m.perplexity_stderr, ".3f")))
            if m.reference_perplexity is not None and m.kl is not None and m.top1_agreement is not None:
                facts.append(("perplexity of the original", f"{m.reference_perplexity:.3f}"))
                facts.append(("KL divergence, nats a token", with_error(m.kl, m.kl_stderr, ".4f")))
                facts.append(("same most likely token", f"{m.top1_agreement:.2%}"))
            facts.append(("KV cache, bytes a token", f"{m.kv_cache_bytes_per_token:,.0f}"))
            facts.append(("at 16 bits", f"{m.kv_cache_bytes_per_token_at_16_bits:,.0f}"))
            facts.append(("scored on", f"{m.tokens:,} tokens of {Path(m.source).name}"))
    if plan is not None:
        facts.append(("fingerprint of the original", plan.fingerprint[:16]))
        facts.append(("plan", f"version {plan.version}, seed {plan.recipe.seed}"))
    facts.append(("this page was made by", f"Paley {paley.__version__}"))
    return facts


def as_data(report: Report) -> dict[str, Any]:
    """What is drawn, as plain data."""
    return {
        "name": report.name,
        "facts": dict(report.facts),
        "figures": {
            f.id: {"missing": f.missing} if f.missing else {"header": f.header, "rows": f.rows} for f in report.figures
        },
        "made": {"command": report.made.command, "versions": report.made.versions},
    }  # fmt: skip
