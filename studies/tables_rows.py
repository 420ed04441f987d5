"""docs/results-rows.md: each row of the weights and binary benchmarks with all that was scored, and its commit."""

from __future__ import annotations

from tables_weights import MODELS, read

__all__ = ["all_lines"]

HEAD = """\
# Results, row by row

Made by `python benchmarks/tables.py`: what [results.md](results.md) sums up, with all that was scored. *bits* are those
stored for each weight of the quantized layers, scales and INT8 columns included; *gap* and *KL* are nats per token; ±
is one standard error over sequences. Rows are measured by the commands that stand there.
"""
KINDS = {"weights": "Weights alone", "binary": "Two bits, four-bit inputs and caches"}


def all_lines() -> list[str]:
    lines = [HEAD]
    for kind, title in KINDS.items():
        for model in MODELS:
            if (found := read(f"{kind}-{model}.json")) is None:
                continue
            n = found["sequences"]
            lines += [
                f"## {title}: {model}",
                "",
                f"{n['test']} test sequences, {n['calibration']} for calibration, {found['machine']}.",
                "",
                "| | bits | perplexity | gap | KL | same top token | commit |",
                "|---|---|---|---|---|---|---|",
            ]
            rows = found["rows"].items()
            for name, row in sorted(rows, key=_budget) if kind == "weights" else rows:
                cells = (
                    f"{row['bits']:.3f}", _plus(row, "perplexity", 3), _plus(row, "gap", 4), _plus(row, "kl", 4),
                    f"{row['top1_agreement']:.1%}", row["commit"][:7],
                )  # fmt: skip
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            lines.append("")
    return lines


def _budget(named: tuple[str, dict]) -> float:
    """'2.5 higgs p=2' -> 2.5"""
    return float(named[0].split()[0])


def _plus(row: dict, key: str, digits: int) -> str:
    return f"{row[key]:,.{digits}f} ± {row[key + '_stderr']:,.{digits}f}"
