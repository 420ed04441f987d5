"""The figures of a report: each has its data, its picture, and what it says in words; or what is missing for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from paley.core.packing import stored_bits
from paley.pipeline.inspect import Inspection
from paley.plan import Plan
from paley.report.charts import Bar, bars, dots, heat_map
from paley.report.measured import Measured
from paley.sensitivity import Sensitivity

__all__ = [
    "Figure",
    "bits_map",
    "clips",
    "errors",
    "losses",
    "outliers",
    "positions",
    "search_trace",
    "sizes",
    "slopes",
]

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Figure:
    """header and rows: the data, as a table. svg is empty if something is missing; `missing` tells what to run."""

    id: str
    title: str
    words: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    svg: str = ""
    missing: str = ""


def _place(name: str) -> tuple[int | None, str]:
    """'model.layers.3.self_attn.q_proj' -> (3, 'q_proj')"""
    found = _LAYER.search(name)
    return (None if found is None else int(found[1])), name.rpartition(".")[2]


def _kinds(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_place(name)[1] for name in names))


def sizes(inspection: Inspection) -> Figure:
    """Where the bytes are: kind after kind up to the whole file, below the original."""
    found: dict[str, int] = {}
    for name, linear in inspection.linears.items():
        kind = _place(name)[1] if linear.scheme.weight is not None else f"{_place(name)[1]}, unquantized"
        found[kind] = found.get(kind, 0) + linear.bytes
    for name, count in inspection.untouched_bytes.items():
        kind = name if name == "norms and biases" else f"{_place(name.removesuffix('.weight'))[1]}, unquantized"
        found[kind] = found.get(kind, 0) + count
    whole = inspection.bytes
    table = [(kind, count, count / whole) for kind, count in found.items() if count]
    starts = accumulate((count for _, count, _ in table), initial=0)
    drawn = [Bar(kind, start, count, _bytes(count)) for (kind, count, _), start in zip(table, starts, strict=False)]
    if inspection.results is not None:
        original = inspection.results.original_bytes
        drawn.insert(0, Bar("original", 0, original, _bytes(original), "total"))
    drawn.append(Bar("this model", 0, whole, _bytes(whole), "total"))
    largest = max(table, key=lambda row: row[1])
    return Figure(
        "size", "Where the bytes are",
        f"{_bytes(whole)} in all; the largest part, {largest[0]}, is {largest[2]:.0%} of it.",
        ("part", "bytes", "share"), tuple((k, c, f"{s:.1%}") for k, c, s in table),
        bars(drawn, "Bytes by kind of tensor"),
    )  # fmt: skip


def bits_map(inspection: Inspection) -> Figure:
    """Bits of each weight, of linears' inputs, keys and values, by layer and kind."""
    cells: dict[str, dict[int, float]] = {}
    rows: list[tuple[Any, ...]] = []

    def put(row: str, name: str, scheme: Any) -> None:
        layer, bits = _place(name)[0], 16.0 if scheme is None else stored_bits(scheme.grid)
        rows.append((name, row, round(bits, 3)))
        if layer is not None:
            cells.setdefault(row, {})[layer] = bits

    for name, linear in inspection.linears.items():
        put(_place(name)[1], name, linear.scheme.weight)
    for name, linear in inspection.linears.items():
        put(f"input of {_place(name)[1]}", name, linear.scheme.input)
    for name, attention in inspection.attentions.items():
        put("keys", name, attention.keys)
        put("values", name, attention.values)
    cells = {
        row: held for row, held in cells.items() if not (row.startswith("input of") and set(held.values()) == {16.0})
    }
    layers = sorted({layer for held in cells.values() for layer in held})
    drawn = {row: [held.get(layer) for layer in layers] for row, held in cells.items()}
    return Figure(
        "bits", "Bits by layer and kind",
        "Bits of a code, without its share of a scale. The stronger the colour, the fewer bits.",
        ("tensor", "kind", "bits"), tuple(rows),
        heat_map([str(layer) for layer in layers], drawn, "Bits by layer and kind"),
    )  # fmt: skip


def errors(inspection: Inspection) -> Figure:
    """The measured error of each weight beside that of its grid for Gaussian weights."""
    table = [
        (name, linear.rel_error, linear.gaussian_error)
        for name, linear in inspection.linears.items()
        if linear.rel_error is not None
    ]
    title = "Measured error of weights, and the grid's own"
    tuned = len(inspection.tuned)
    if not table:
        missing = "results.json is not in this folder; `paley quantize` writes it"
        if tuned:
            missing = f"the scales of all {tuned} layers were tuned after rounding, and no error was measured since"
        return Figure("error", title, "", missing=missing)
    series = {
        kind: [
            (float(layer), error, f"{name}: {error:.4g}")
            for name, error, _ in table
            if _place(name)[1] == kind and (layer := _place(name)[0]) is not None
        ]
        for kind in _kinds(name for name, *_ in table)
    }
    series["grid's own"] = [
        (float(layer), own, f"{name}: the grid's own {own:.4g}")
        for name, _, own in table
        if own is not None and (layer := _place(name)[0]) is not None
    ]
    series = {kind: points for kind, points in series.items() if points}
    off = sum(linear.excess is not None for linear in inspection.linears.values())
    words = (
        "‖W − Ŵ‖² / ‖W‖² of each rotated weight, on a logarithmic axis. "
        + (f"{off} layers are off their grid's error for Gaussian weights beyond chance." if "grid's own" in series else
           "GPTQ chose the codes, or the grid is not for Gaussian weights: it has no error of its own to compare with.")
    )  # fmt: skip
    words += f" {tuned} layers are left out, whose scales were tuned after rounding." if tuned else ""
    rows = tuple((n, f"{e:.5g}", "" if g is None else f"{g:.5g}") for n, e, g in table)
    svg = dots(series, title, x_name="layer", y_name="relative squared error", log=True, apart=True)
    return Figure("error", title, words, ("tensor", "measured", "grid's own"), rows, svg)


def slopes(
    inspection: Inspection, sensitivity: Sensitivity | None, curve: Sequence[tuple[float, float]]
) -> list[Figure]:
    """Sensitivity against bits, and the predicted loss of each budget."""
    titles = "Sensitivity against bits", "Predicted loss by budget"
    if sensitivity is None:
        how = "`paley sensitivity ORIGINAL --output alpha.json`, then `paley report … --sensitivity alpha.json`"
        return [
            Figure("sensitivity", titles[0], "", missing=how),
            Figure("budget", titles[1], "", missing=f"{how}, with `--against ORIGINAL`"),
        ]
    alphas, rows = sensitivity.alphas(), []
    series: dict[str, list[tuple[float, float, str]]] = {}
    for name, linear in inspection.linears.items():
        if (alpha := alphas.get(name)) is None:
            continue
        bits = 16.0 if linear.scheme.weight is None else stored_bits(linear.scheme.weight.grid)
        rows.append((name, f"{alpha:.5g}", round(bits, 3)))
        series.setdefault(_place(name)[1], []).append((bits, alpha, f"{name}: {alpha:.4g} at {bits:.3g} bits"))
    first = Figure(
        "sensitivity", titles[0], "The loss that a layer's relative squared error of 1 would add, by the slope at 0.",
        ("tensor", "slope", "bits"), tuple(rows),
        dots(series, titles[0], x_name="bits", y_name="slope", log=True),
    )  # fmt: skip
    if not curve:
        return [
            first,
            Figure("budget", titles[1], "", missing="`paley report … --sensitivity alpha.json --against ORIGINAL`"),
        ]
    points = [(bits, loss, f"{bits:.3g} bits: {loss:.4g}") for bits, loss in curve]
    second = Figure(
        "budget", titles[1], "What the best allocation of free grids would lose, by the slopes.",
        ("bits a weight", "predicted loss"), tuple((f"{b:.3f}", f"{v:.5g}") for b, v in curve),
        dots({"best": points}, titles[1], x_name="bits a weight", y_name="predicted loss", log=True, joined=True),
    )  # fmt: skip
    return [first, second]


def search_trace(plan: Plan | None) -> Figure:
    """The objective of each trial of a search of clip ratios."""
    title = "Search of clip ratios"
    if plan is None or not plan.trace:
        return Figure(
            "search", title, "", missing="the recipe searched none: `paley quantize … --set search.method=gbs` does"
        )
    best = list(accumulate((trial.objective for trial in plan.trace), min))
    series = {
        "trial": [
            (float(i), t.objective, f"{t.slot}, {t.clip_ratio:.3f}: {t.objective:.5g}")
            for i, t in enumerate(plan.trace)
        ],
        "best so far": [(float(i), value, f"best of {i + 1}: {value:.5g}") for i, value in enumerate(best)],
    }
    rows = tuple((i, t.slot, f"{t.clip_ratio:.4f}", f"{t.objective:.5g}") for i, t in enumerate(plan.trace))
    words = f"{len(plan.trace)} trials; the objective ({plan.recipe.search.objective}) fell to {best[-1]:.5g}."
    svg = dots(series, title, x_name="trial", y_name="objective", zero=False, lines=("best so far",))
    return Figure("search", title, words, ("trial", "site", "clip ratio", "objective"), rows, svg)


def clips(inspection: Inspection) -> Figure:
    """The clip ratio of each place where something is rounded at run time."""
    title = "Clip ratios by layer"
    places = [(f"input of {_place(n)[1]}", n, linear.scheme.input) for n, linear in inspection.linears.items()]
    places += [(s, n, getattr(a, s)) for n, a in inspection.attentions.items() for s in ("keys", "values")]
    series: dict[str, list[tuple[float, float, str]]] = {}
    rows = []
    for kind, name, scheme in places:
        if scheme is not None and (layer := _place(name)[0]) is not None:
            rows.append((kind, name, f"{scheme.clip_ratio:.4f}"))
            series.setdefault(kind, []).append((float(layer), scheme.clip_ratio, f"{name}: {scheme.clip_ratio:.4f}"))
    if not series:
        return Figure(
            "clips", title, "", missing="nothing is rounded at run time: inputs, keys and values have 16 bits"
        )
    svg = dots(series, title, x_name="layer", y_name="clip ratio", zero=False, joined=True)
    return Figure("clips", title, "Of inputs, keys and values.", ("kind", "tensor", "clip ratio"), tuple(rows), svg)


_AGAINST = "`paley report … --against ORIGINAL`"


def positions(measured: Measured | None) -> Figure:
    """KL divergence by the place of a token in its sequence."""
    title = "KL divergence by token position"
    if measured is None:
        return Figure("positions", title, "", missing=_AGAINST)
    points = [(place, kl, f"about token {place:.0f}: {kl:.4g}") for place, kl in measured.by_position()]
    rows = tuple((f"{place:.0f}", f"{kl:.5g}") for place, kl, _ in points)
    words = f"Nats a token, mean of {measured.sequences} sequences of {measured.source}, through the quantized cache."
    svg = dots({"KL": points}, title, x_name="position", y_name="nats", joined=True)
    return Figure("positions", title, words, ("position", "KL"), rows, svg)


def losses(measured: Measured | None) -> Figure:
    """How KL is spread over tokens: a few tokens have most of it."""
    title = "Share of the KL divergence by token"
    if measured is None:
        return Figure("losses", title, "", missing=_AGAINST)
    shares = measured.concentration()
    points = [(part, share, f"the worst {part:.0%}: {share:.0%} of all KL") for part, share in shares]
    rows = tuple((f"{part:.1%}", f"{share:.1%}") for part, share in shares)
    svg = dots({"KL": points}, title, x_name="part of the tokens, worst first", y_name="part of the KL", joined=True)
    return Figure("losses", title, "", ("tokens", "of the KL"), rows, svg)


def outliers(measured: Measured | None) -> Figure:
    """The largest value of linears' inputs over their root mean square, in the original and as they are rounded."""
    title = "Outliers of inputs before and after rotation"
    if measured is None:
        return Figure("outliers", title, "", missing=_AGAINST)
    series = {
        what: [
            (float(layer), pair[which], f"{name}, {what}: {pair[which]:.3g}")
            for name, pair in measured.peaks.items()
            if (layer := _place(name)[0]) is not None
        ]
        for which, what in enumerate(("original", "as it is multiplied here"))
    }
    rows = tuple((name, f"{a:.4g}", f"{b:.4g}") for name, (a, b) in measured.peaks.items())
    words = "Largest value of a token's input over its root mean square, mean over tokens. Gaussian values have 3 to 4."
    svg = dots(series, title, x_name="layer", y_name="largest / root mean square", log=True, apart=True)
    return Figure("outliers", title, words, ("layer's input", "original", "here"), rows, svg)


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,.0f} bytes"
