"""Draws KL against bytes, ours and the peers', from the results of `studies.peers`: docs/figures/peers.png.

python -m studies.peers_figure (needs matplotlib)
"""

from __future__ import annotations

import argparse

from studies.experiment import RESULTS, measured
from studies.quantizers import QUANTIZERS

FIGURE = RESULTS.parents[1] / "docs" / "figures" / "peers.png"
OURS, PEER, OTHERS = range(3)
STYLES = {  # colour, marker, label
    OURS: ("C0", "o", "Paley"),
    PEER: ("0.45", "s", "llama.cpp, with an importance matrix"),
    OTHERS: ("C1", "^", "others, embedding in 16 bits"),
}
PREFIX = "llama.cpp "
LEAST = 5  # rows of llama.cpp, for a picture to say something


def draw() -> None:
    import matplotlib.pyplot as plt  # a dependency of this alone

    found = [r for r in measured("peers").values() if sum(name.startswith(PREFIX) for name in r["rows"]) >= LEAST]
    figure, axes = plt.subplots(1, len(found), figsize=(9.0 * len(found), 6.0), squeeze=False, layout="constrained")
    for axis, result in zip(axes.flat, found, strict=True):
        for name, row in result["rows"].items():
            if name.endswith("e16"):  # whose bits are those of the blocks alone
                continue
            whose = PEER if name.startswith(PREFIX) else OTHERS if name in QUANTIZERS else OURS
            colour, marker, _ = STYLES[whose]
            megabytes = row["bits"] * result["parameters"] / 8e6
            axis.errorbar(megabytes, row["kl"], row["kl_stderr"], fmt=marker, color=colour, markersize=5, capsize=2)
            axis.annotate(
                name.removeprefix(PREFIX), (megabytes, row["kl"]), (6 if whose else -6, 3), textcoords="offset points",
                color=colour, fontsize=8, ha="left" if whose else "right",
            )  # fmt: skip
        whole = result["parameters"] * 2 / 1e6
        above = axis.secondary_xaxis("top", functions=(lambda mb, w=whole: mb / w * 16, lambda b, w=whole: b * w / 16))
        above.set_xlabel("bits a weight, all tensors counted")
        axis.set(yscale="log", xlabel=f"megabytes (16 bits: {whole:.0f})", title=result["model"])
        axis.grid(which="both", color="0.92")
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("KL to the original, nats a token")
    for colour, marker, label in STYLES.values():
        axes[0][0].plot([], [], marker, color=colour, label=label)
    axes[0][0].legend(loc="upper right", frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw()


if __name__ == "__main__":
    main()
