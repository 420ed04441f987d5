"""Charts as SVG: bars, a map, dots and lines. Colours are classes of the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Bar", "bars", "dots", "heat_map"]

_WIDTH, _ROW = 760, 24
_LETTER = 7.4  # pixels of a letter in the widest of the fonts that stand for system-ui, DejaVu Sans
_LETTERS = 34  # of a label; a longer one is shortened, and its tooltip has all of it
_READABLE = 0.48  # the strongest fill on which text has enough contrast, in light and in dark
_SHAPES = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", "M-3.2-3.2h6.4v6.4h-6.4z", "M0-4.4L4.2 3H-4.2z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
)  # fmt: skip
Point = tuple[float, float, str]  # x, y, what a reader is told of it


class Bar(NamedTuple):
    """start and length in one unit; beside: the text at its end; kind: its class in the page."""

    label: str
    start: float
    length: float
    beside: str
    kind: str = "c0"


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    shown = text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
    whole = "" if shown == text else f"<title>{escape(text)}</title>"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{whole}{escape(shown)}</text>'


def _room(texts: Iterable[str]) -> float:
    """Pixels that the longest of the texts takes, and a gap."""
    return 10 + _LETTER * max((min(len(text), _LETTERS) for text in texts), default=0)


def bars(rows: Sequence[Bar], title: str, *, heading: bool = False) -> str:
    """Bars from top to bottom; heading: below the title."""
    most = max((bar.start + bar.length for bar in rows), default=0) or 1
    left = _room(bar.label for bar in rows)
    scale, top = (_WIDTH - left - _room(bar.beside for bar in rows)) / most, 26 if heading else 4
    parts = [_text(4, 16, title, "start", "quiet")] if heading else []
    for index, bar in enumerate(rows):
        y, x, width = index * _ROW + top, left + scale * bar.start, max(scale * bar.length, 1)
        parts += [
            _text(left - 8, y + 13, bar.label, "end"),
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 6}" class="{bar.kind}">'
            f"<title>{escape(bar.label)}: {escape(bar.beside)}</title></rect>",
            _text(x + width + 6, y + 13, bar.beside),
        ]
    return _svg(len(rows) * _ROW + top + 4, parts, title)


def heat_map(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], title: str) -> str:
    """Cells of bits: the fewer, the stronger; None is empty. Cells tell their numbers if these fit."""
    left = _room(rows)
    cell = (_WIDTH - left) / max(len(columns), 1)
    numbers = [f"{value:.3g}" for values in rows.values() for value in values if value is not None]
    told = all(_LETTER * len(number) + 3 < cell for number in numbers)
    parts = []
    for index, (label, values) in enumerate(rows.items()):
        y = index * _ROW
        parts.append(_text(left - 8, y + 16, label, "end"))
        for column, value in enumerate(values):
            if value is None:
                continue
            x = left + column * cell
            strength = (_READABLE if told else 1) * max(0.08, min(1.0, math.log2(16 / max(value, 0.1)) / 3))
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{cell - 1:.1f}" height="{_ROW - 1}" class="c0" '
                f'fill-opacity="{strength:.2f}"><title>{escape(label)}, layer {escape(columns[column])}: {value:.3g} '
                "bits</title></rect>"
            )
            if told:
                parts.append(_text(x + cell / 2, y + 16, f"{value:.3g}", "middle"))
    every = max(1, math.ceil(_room(columns) / cell))
    foot = len(rows) * _ROW + 14
    parts += [
        _text(left + (i + 0.5) * cell, foot, name, "middle", "quiet")
        for i, name in enumerate(columns)
        if i % every == 0
    ]
    parts.append(_text(left - 8, foot, "layer", "end", "quiet"))
    return _svg(foot + 8, parts, title)


def dots(
    series: Mapping[str, Sequence[Point]], title: str, *, x_name: str, y_name: str, log: bool = False,
    zero: bool = True, joined: bool = False, lines: Container[str] = (), apart: bool = False,
) -> str:  # fmt: skip
    """Points of several series; log: the y axis, which leaves out what it cannot show; zero: any other begins at 0;
    joined: with lines; lines: series that are a line without marks; apart: the series side by side, at whole x.
    """
    left, height, top = 70, 310, 24
    seen = {
        name: [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not log)] for name, points in series.items()
    }
    everything = [p for points in seen.values() for p in points]
    if not everything:
        return _svg(30, [_text(8, 20, "nothing to show")], title)
    value = math.log10 if log else float
    beyond = 0.45 if apart else 0
    low_x, high_x = _range([p[0] + side for p in everything for side in (-beyond, beyond)])
    low_y, high_y = _range([value(p[1]) for p in everything] + ([0.0] if zero and not log else []))
    right, bottom = _WIDTH - 20, height - 40
    step = min(9.0, 0.8 * (right - left) / (high_x - low_x) / len(seen)) if apart else 0.0

    def x_of(x: float, index: float = 0) -> float:
        return left + (right - left) * (x - low_x) / (high_x - low_x) + step * index

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * (value(y) - low_y) / (high_y - low_y)

    parts = [f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>']
    for y in _log_ticks(low_y, high_y) if log else _ticks(low_y, high_y):
        parts += [
            f'<path class="grid" d="M{left} {y_of(y):.1f}H{right}"/>',
            _text(left - 6, y_of(y) + 4, f"{y:.3g}", "end", "quiet"),
        ]
    whole = all(p[0] == int(p[0]) for p in everything)
    parts += [
        _text(x_of(x), bottom + 16, f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}", "middle", "quiet")
        for x in _ticks(low_x, high_x, 1.0 if whole else 0.0)
    ]
    parts += [_text(right, bottom + 32, x_name, "end", "quiet"), _text(4, 12, y_name, "start", "quiet")]
    for index, (name, points) in enumerate(seen.items()):
        places = [(x_of(x, index - (len(seen) - 1) / 2), y_of(y), told) for x, y, told in points]
        if (joined or name in lines) and len(points) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
            parts.append(f'<path class="line c{index % 8}" d="M{path}"/>')
        parts += [] if name in lines else [_mark(x, y, index, told) for x, y, told in places]
    if len(seen) == 1:
        return _svg(height, parts, title)
    legend, rows = _legend(list(seen), left, height + 4)
    return _svg(height + 12 + 18 * rows, [*parts, *legend], title)


def _mark(x: float, y: float, index: int, told: str = "") -> str:
    """Of a series: 8 colours, and 4 shapes for eyes that do not tell colours apart."""
    shape = _SHAPES[(index + index // 8) % len(_SHAPES)]
    tooltip = f"<title>{escape(told)}</title>" if told else ""
    return (
        f'<path class="{"mark" if told else "key"} c{index % 8}" transform="translate({x:.1f} {y:.1f})" d="{shape}">'
        f"{tooltip}</path>"
    )


def _legend(names: Sequence[str], left: float, top: float) -> tuple[list[str], int]:
    """Marks and names, and how many rows they take beyond the first."""
    parts, x, row = [], left, 0
    for index, name in enumerate(names):
        width = 22 + _room([name])
        if x > left and x + width > _WIDTH:
            x, row = left, row + 1
        y = top + 18 * row
        parts += [_mark(x + 6, y - 4, index), _text(x + 15, y, name)]
        x += width
    return parts, row


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """About six round numbers within an axis, at least `least` apart."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = max(least, power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Of an axis from 10^low to 10^high: 1, 2 and 5 of each power, fewer if it is long, evenly spaced ones if short."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(powers) / 8)
    for digits in ((1, 2, 5), (1,)):
        found = [
            m * 10.0**p for p in powers if p % every == 0 for m in digits if low <= math.log10(m * 10.0**p) <= high
        ]
        if 3 <= len(found) <= 9:
            return found
    return [y for y in _ticks(10**low, 10**high) if y > 0]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis: never empty."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
