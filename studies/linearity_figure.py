"""Renews the summaries of all linearity studies and draws predicted against measured loss: docs/figures/linearity.png.

python -m studies.linearity_figure (needs matplotlib)
"""

from __future__ import annotations

import argparse

from studies.experiment import RESULTS, measured
from studies.linearity import save

from paley.methods.sensitivity import MAX_T

FIGURE = RESULTS.parents[1] / "docs" / "figures" / "linearity.png"


def draw() -> None:
    import matplotlib.pyplot as plt  # a dependency of this alone

    found = list(measured("linearity").values())
    for result in (*found, *measured("linearity-stretched").values()):
        save(result)
    figure, axes = plt.subplots(-(-len(found) // 2), 2, figsize=(10.4, 4.7 * -(-len(found) // 2)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, result in zip(axes.flat, found, strict=False):
        values = [r[key] for r in result["rows"].values() for key in ("kl_predicted", "kl")]
        ends = min(values) / 1.4, max(values) * 1.4
        axis.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
        colours = plt.cm.ScalarMappable(plt.Normalize(2, 5), "viridis")
        for name, r in result["rows"].items():
            colour, marker = colours.to_rgba(r["grid_bits"]), "s" if name.startswith("uniform") else "o"
            inside = colour if r["largest_t2"] <= MAX_T**2 else "none"
            axis.scatter(r["kl_predicted"], r["kl"], s=34, marker=marker, facecolor=inside, edgecolor=colour)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        axis.set(title=result["model"], xlabel="predicted KL, sum of $\\alpha\\,t^2$ (nats a token)")
    for axis in axes[:, 0]:
        axis.set_ylabel("measured KL on test text")
    for marker, inside, label in (
        ("o", "0.4", "random grids"), ("s", "0.4", "one grid for all"), ("o", "none", "a layer beyond $t^2=4^{-1.7}$")
    ):  # fmt: skip
        axes[0][0].scatter([], [], s=34, marker=marker, facecolor=inside, edgecolor="0.4", label=label)
    axes[0][0].legend(loc="lower right", frameon=False)
    figure.colorbar(colours, ax=axes, label="mean bits of the grids")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw()


if __name__ == "__main__":
    main()
