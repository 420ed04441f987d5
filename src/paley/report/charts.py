"""Charts as SVG: bars, a map, dots and lines. Colours are classes of the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "dots", "heat_map"]

_WIDTH, _LEFT, _RIGHT = 760, 170, 110
_ROW = 24
Point = tuple[float, float, str]  # x, y, what a reader is told of it


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def bars(rows: Sequence[tuple[str, float, float, str]], title: str) -> str:
    """rows of (label, where the bar begins, its length, what stands beside it), from top to bottom."""
    most = max((start + length for _, start, length, _ in rows), default=0) or 1
    room, parts = _WIDTH - _LEFT - _RIGHT, []
    for index, (label, start, length, beside) in enumerate(rows):
        y, x, width = index * _ROW + 4, _LEFT + room * start / most, room * length / most
        total = ' class="total"' if index in (0, len(rows) - 1) else ' class="c0"'
        parts += [
            _text(_LEFT - 8, y + 13, label, "end"),
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="{_ROW - 6}"{total}>'
            f"<title>{escape(label)}: {escape(beside)}</title></rect>",
            _text(x + width + 6, y + 13, beside),
        ]
    return _svg(len(rows) * _ROW + 8, parts, title)


def heat_map(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], title: str) -> str:
    """Cells of bits: the fewer, the darker; None is empty. A cell tells its number if there is room."""
    cell = (_WIDTH - _LEFT) / max(len(columns), 1)
    parts = []
    for index, (label, values) in enumerate(rows.items()):
        y = index * _ROW
        parts.append(_text(_LEFT - 8, y + 16, label, "end"))
        for column, value in enumerate(values):
            if value is None:
                continue
            x, strength = _LEFT + column * cell, max(0.08, min(1.0, (9 - value) / 8))
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{cell - 1:.1f}" height="{_ROW - 1}" class="c0" '
                f'fill-opacity="{strength:.2f}"><title>{escape(label)}, layer {escape(columns[column])}: {value:.3g} '
                "bits</title></rect>"
            )
            if cell > 30:
                kind = "middle strong" if strength > 0.55 else "middle"
                parts.append(_text(x + cell / 2, y + 16, f"{value:.3g}", "middle", kind))
    every = max(1, math.ceil(len(columns) / 16))
    foot = len(rows) * _ROW + 14
    parts += [
        _text(_LEFT + (i + 0.5) * cell, foot, name, "middle", "quiet")
        for i, name in enumerate(columns)
        if i % every == 0
    ]
    return _svg(foot + 8, parts, title)


def dots(
    series: Mapping[str, Sequence[Point]], title: str, *, x_name: str, y_name: str, log: bool = False,
    joined: bool = False,
) -> str:  # fmt: skip
    """Points of several series; log: the y axis, which leaves out what it cannot show; joined: with lines."""
    left, height, top = 70, 310, 24
    seen = {
        name: [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not log)] for name, points in series.items()
    }
    everything = [p for points in seen.values() for p in points]
    if not everything:
        return _svg(30, [_text(8, 20, "nothing to show")], title)
    value = math.log10 if log else float
    low_x, high_x = _range([p[0] for p in everything])
    low_y, high_y = _range([value(p[1]) for p in everything] + ([] if log else [0.0]))
    right, bottom = _WIDTH - 20, height - 40

    def x_of(x: float) -> float:
        return left + (right - left) * (x - low_x) / (high_x - low_x)

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * (value(y) - low_y) / (high_y - low_y)

    parts = [f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>']
    for tick in range(5):
        at_y, y = low_y + tick * (high_y - low_y) / 4, bottom - (bottom - top) * tick / 4
        label = f"{10**at_y if log else at_y:.3g}"
        parts += [f'<path class="grid" d="M{left} {y:.1f}H{right}"/>', _text(left - 6, y + 4, label, "end", "quiet")]
    whole = all(p[0] == int(p[0]) for p in everything)
    ticks = {low_x + tick * (high_x - low_x) / 8 for tick in range(9)}
    for at_x in sorted({round(tick) for tick in ticks} if whole else ticks):
        if low_x <= at_x <= high_x:
            parts.append(_text(x_of(at_x), bottom + 16, f"{at_x:.3g}", "middle", "quiet"))
    parts += [_text(right, bottom + 32, x_name, "end", "quiet"), _text(4, 12, y_name, "start", "quiet")]
    for index, points in enumerate(seen.values()):
        kind = f"c{index % 8}"
        if joined and len(points) > 1:
            path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y, _ in points)
            parts.append(f'<path class="line {kind}" d="M{path}"/>')
        parts += [
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" class="{kind}">'
            f"<title>{escape(told)}</title></circle>"
            for x, y, told in points
        ]
    for index, name in enumerate(seen):
        x, y = left + 14 + 170 * (index % 4), height + 4 + 18 * (index // 4)
        parts += [f'<rect x="{x}" y="{y - 9}" width="10" height="10" class="c{index % 8}"/>', _text(x + 15, y, name)]
    return _svg(height + 12 + 18 * ((len(seen) - 1) // 4), parts, title)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis: never empty."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
