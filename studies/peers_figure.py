"""Draws KL against bytes, ours and the peers', from the results of `studies.peers`: docs/figures/peers.png.

python -m studies.peers_figure (needs matplotlib)
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from studies.experiment import RESULTS, measured
from studies.quantizers import QUANTIZERS

FIGURE = RESULTS.parents[1] / "docs" / "figures" / "peers.png"
PREFIX = "llama.cpp "
LEAST = 5  # rows of llama.cpp, for a picture to say something
BITS, LOSSES = (2, 7.9), (0.001, 2)  # of the axes
# What a row's name looks like -> label, style, whether a line goes through them and names stand left of it.
GROUPS: dict[str, tuple[str, dict[str, Any], bool]] = {
    r"^trellis.*GPTQ, e[\d.]+$": ("Paley: w2a16 to w6a16", {"color": "C0", "marker": "o"}, True),
    r"^trellis.*diagonal$": ("Paley: balanced-2 to -5", {"color": "C9", "marker": "o"}, True),
    r"^llama.cpp [^,]*$": ("llama.cpp, importance matrix", {"color": "0.35", "marker": "s"}, False),
    r"^llama.cpp .*,": (
        "the same, smaller embedding",
        {"color": "0.35", "marker": "s", "markerfacecolor": "white"},
        False,
    ),
    "|".join(map(re.escape, QUANTIZERS)): ("others, embedding in 16 bits", {"color": "C1", "marker": "^"}, False),
}


def _named(name: str) -> str:
    """Without what the legend or the page says."""
    return re.sub(", GPTQ|, scales in 8 bits|, 200 steps", "", name.removeprefix(PREFIX)).replace(", embedding", " +")


def _write(axis: Any, placed: list[Any], name: str, point: tuple[float, float], color: str, left: bool) -> None:
    """The name beside its point, where it covers no other; nowhere if each place is taken."""
    canvas = axis.figure.canvas.get_renderer()
    sides = [(-6, -9, "right"), (-6, 3, "right"), (6, 3, "left")] if left else [(6, 3, "left"), (6, -9, "left")]
    for x, y, side in sides:
        text = axis.annotate(name, point, (x, y), textcoords="offset points", color=color, fontsize=8, ha=side)
        box = text.get_window_extent(canvas)
        inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
        if inside and not any(box.overlaps(other) for other in placed):
            placed.append(box)
            return
        text.remove()


def draw() -> None:
    import matplotlib.pyplot as plt  # a dependency of this alone
    from matplotlib.transforms import Bbox

    found = [r for r in measured("peers").values() if sum(name.startswith(PREFIX) for name in r["rows"]) >= LEAST]
    figure, axes = plt.subplots(
        1, len(found), figsize=(7.0 * len(found), 6.0), squeeze=False, layout="constrained", sharey=True
    )
    for axis, result in zip(axes.flat, found, strict=True):
        megabytes = result["parameters"] / 8e6
        axis.set(yscale="log", ylim=LOSSES, xlim=[bits * megabytes for bits in BITS], title=result["model"])
        axis.set_xlabel(f"megabytes (16 bits: {16 * megabytes:.0f})")
        axis.secondary_xaxis("top", functions=(lambda x, m=megabytes: x / m, lambda x, m=megabytes: x * m)).set_xlabel(
            "bits a weight, all tensors counted"
        )
        axis.grid(which="both", color="0.92")
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("KL to the original, nats a token")
    figure.canvas.draw()  # sizes are known from here on
    for axis, result in zip(axes.flat, found, strict=True):
        named = []  # (name, point, colour, whether ours)
        for pattern, (label, style, ours) in GROUPS.items():
            rows = {name: row for name, row in result["rows"].items() if re.search(pattern, name)}
            rows = {name: row for name, row in rows.items() if not name.endswith("e16")}  # bits of the blocks alone
            points = {
                name: (row["bits"] * result["parameters"] / 8e6, row["kl"])
                for name, row in sorted(rows.items(), key=lambda item: item[1]["bits"])
                if row["bits"] < BITS[1] and LOSSES[0] < row["kl"] < LOSSES[1]
            }
            line = {"linestyle": "-" if ours else "none", "linewidth": 1, "markersize": 5, "capsize": 2}
            x, y = zip(*points.values(), strict=True) if points else ((), ())
            axis.errorbar(x, y, [rows[name]["kl_stderr"] for name in points], label=label, **line, **style)
            named += [(_named(name), point, style["color"], ours) for name, point in points.items()]
        corners = [axis.transData.transform(point) for _, point, _, _ in named]
        placed: list[Any] = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in corners]
        for name, point, color, ours in named:
            _write(axis, placed, name, point, color, ours)
    shown = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(*shown, loc="outside lower center", ncols=len(shown[1]), frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw()


if __name__ == "__main__":
    main()
