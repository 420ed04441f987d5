"""The part of docs/results.md on weights alone: grids, methods at equal bits, slopes, linearity, streaming, speed."""

from __future__ import annotations

import math
from collections import Counter

from bench.record import RESULTS as SPEEDS
from studies.experiment import measured, read


def grids() -> list[str]:
    """Every grid with its t2 and its distance to Shannon's bound."""
    if (found := read("grids.json")) is None:
        return []
    lines = [
        "## Grids",
        "",
        "Relative squared error t² on N(0, 1), and decibels above Shannon's bound 4^−bits; p = 1 by exact",
        "integration, others on at least 2 million samples that they were not made from. nf and af are scaled by the",
        "largest of 64 values: their 16/64 bits of scale are not in *bits*. Of a trellis n is the number of codes: a",
        "value depends on the codes before it, too. `python -m studies.grid_table`",
        "",
        "| grid | p | n | bits | t² | published | dB above Shannon |",
        "|---|---|---|---|---|---|---|",
    ]
    for g in sorted(found["grids"], key=lambda g: (round(g["bits"], 2), g["t2"])):
        published = "" if g["published"] is None else f"{g['published']:.4g}"
        lines.append(
            f"| {g['name']} | {g['p']} | {g['n']:,} | {g['bits']:.2f} | {g['t2']:.4g} | {published} "
            f"| {g['decibels_to_shannon']:.2f} |"
        )
    return [*lines, ""]


def weights() -> list[str]:
    """A row a method, a column a budget; the gap, and the bits that are really stored where they fall short."""
    lines = [
        "## Weights alone, at equal stored bits",
        "",
        "Loss gained, nats per token, ± one standard error; inputs and caches unquantized. Each budget has one",
        "float16 scale a row (or 1024 columns of it) on top; in brackets the bits that a row stores where it has no",
        "finer setting. `rtn`, `nf`, `af`, `gptq` and `hqq` quantize the weights as they are; `higgs` is as",
        "published, and needs no data; `unbiased` has its scales stretched; allocation goes by slopes on text that",
        "the model sampled itself; *ours*: as `--preset w4a16e16h16`, rotations folded, GPTQ aimed at the residual",
        "stream, on one-dimensional grids (`ours, w?a16`) or on vectors of two, as the preset has at 4 bits.",
        "Perplexities and KL: [the JSON rows](../studies/results).",
        "",
    ]
    for model, found in measured("weights").items():
        rows: dict[str, dict[str, dict]] = {}
        for key, row in found["rows"].items():
            budget, _, method = key.partition(" ")
            rows.setdefault(method, {})[budget] = row
        budgets = sorted({b for row in rows.values() for b in row}, key=float)
        lines += [
            f"**{model}**, {found['sequences']['test']} test sequences, rows of {commits(found)}. "
            "`python -m studies.weights MODEL --text FILE`",
            "",
            "| | " + " | ".join(budgets) + " |",
            "|---" * (len(budgets) + 1) + "|",
        ]
        most = {b: max(row[b]["bits"] for row in rows.values() if b in row) for b in budgets}
        for method, row in rows.items():
            cells = [_cell(row[b], most[b]) if b in row else "" for b in budgets]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def commits(found: dict) -> str:
    """'commits 7a8ce1a (70 rows), 0453b33 (28)': where each row of a file was measured."""
    measured = (row["commit"].partition("+") for row in found["rows"].values())
    counts = Counter(commit[:7] + plus + changes for commit, plus, changes in measured)
    return ", ".join(f"{commit} ({count})" for commit, count in counts.most_common())


def _cell(row: dict, most: float) -> str:
    short = f" ({row['bits']:.2f})" if row["bits"] < most - 0.05 else ""
    digits = 3 if row["gap"] < 1 else 2
    return f"{row['gap']:.{digits}f} ± {row['gap_stderr']:.{digits}f}{short}"


def linearity() -> list[str]:
    """Predicted loss against measured, by bits, and the layers whose error is not their grid's."""
    found = {model: r["summary"] for model, r in measured("linearity").items()}
    stretched = measured("linearity-stretched")
    found |= {f"{model}, stretched scales": r["summary"] for model, r in stretched.items()}
    if not found:
        return []
    lines = [
        "## Predicted and measured loss",
        "",
        "![predicted against measured](figures/linearity.png)",
        "",
        "48 allocations of p = 2 grids, HIGGS alone, scales by rms unless said otherwise: what the slopes predict",
        "against what was measured, KL in nats per token. `python -m studies.linearity MODEL [--stretched]`",
        "",
        "| | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    rows: dict[str, dict[str, str]] = {}
    for model, summary in found.items():
        kl = summary["kl"]
        cells = {"rank correlation, 30 random ones of 3 to 5 bits": f"{kl['spearman']:.3f}"}
        if "perplexity" in summary:
            cells["the same of the growth of perplexity"] = f"{summary['perplexity']['spearman']:.3f}"
        cells["correlation of logs, mean bits regressed out"] = f"{kl['pearson of logs, bits regressed out']:.3f}"
        for bits, (ratio, count) in kl["median ratio by bits"].items():
            cells[f"measured / predicted, {bits} bits"] = f"{ratio:.2f} ({count})"
        cells |= {f"slopes: {pair}": f"{rank:.3f}" for pair, rank in summary["rank correlations of slopes"].items()}
        for grid in ("p2n256", "p2n64", "p2n16"):
            layers = summary[f"rel_error / that of Gaussian weights - 1, {grid}"]
            beyond = f"{layers['beyond 3% and 3 standard errors']} of {layers['layers']}"
            cells[f"layers' error / Gaussians' − 1, {grid}: mean, largest, beyond 3% and chance"] = (
                f"{layers['mean']:+.1%}, {layers['largest']:+.1%}, {beyond}"
            )
        for name, cell in cells.items():
            rows.setdefault(name, {})[model] = cell
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(row.get(model, "") for model in found) + " |")
    return [*lines, ""]


def sensitivities() -> list[str]:
    lines = [
        "## Slopes",
        "",
        "Measured with noise of one size in all rows of a weight, as the paper has it; below, noise goes by rows.",
        "Rank correlation (Spearman) of the slopes of all linear layers, measured with norms folded. `python",
        "studies/sensitivity.py MODEL`",
        "",
        "| model | " + " | ".join(["KL, perplexity", "KL, random tokens", "another seed", "folded, unfolded"]) + " |",
        "|---|---|---|---|---|",
    ]
    for model, found in measured("sensitivity").items():
        ranks = found["rank correlations"]
        more = [found[key]["rank correlation"] for key in ("kl text, another seed", "kl text, unfolded")]
        cells = [ranks["kl text, ppl text"], ranks["kl random, kl text"], *more]
        lines.append(f"| {model} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    return [*lines, ""]


def streaming() -> list[str]:
    if (r := read("streaming.json", SPEEDS)) is None:
        return []
    lines = [
        "## A checkpoint larger than memory",
        "",
        f"`--preset {r['preset']} --no-score` of a random LLaMA of {r['parameters'] / 1e9:.2f} billion parameters, "
        f"{r['original_bytes'] / 1e9:.2f} GB in bfloat16, {r['bytes'] / 1e9:.2f} GB afterwards; "
        f"checking the original (each "
        f"weight finite, fingerprint) included. Commit {r['commit'][:10]}, on two busy cores. "
        f"`python -m bench.streaming "
        "FOLDER`",
        "",
        "| | seconds | a billion | peak of a process | of all |",
        "|---|---|---|---|---|",
    ]
    for name in ("one_process", "two_processes"):
        m = r[name]
        lines.append(
            f"| {name.replace('_', ' ')} | {m['seconds']:.0f} | {m['seconds_per_billion']:.1f} "
            f"| {m['peak_bytes'] / 1e9:.2f} GB | {m['peak_bytes_all_processes'] / 1e9:.2f} GB |"
        )
    same = "the same bytes" if r["same_bytes"] else "OTHER BYTES"
    return [
        *lines,
        "",
        f"Killed after {r['killed']['seconds']:.0f} s with {r['killed']['weights_done']} weights done and resumed in "
        f"{r['resumed']['seconds']:.0f} s: {same}, as with two processes.",
        "",
    ]


def speed() -> list[str]:
    if (r := read("nearest-speed.json", SPEEDS)) is None:
        return []
    whole = r["quantizers"]
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    lines = [
        "## Speed of rounding",
        "",
        "Million weights a second of processor time, one thread, of a busy machine "
        f"({r['machine']}; {versions}). *whole*: from float32 weights to all that is stored; ours rotate in float64, "
        "scale, round, check and pack, of which *rounding* is the scales and codes alone, and *nearest point* only the "
        "search. Errors are ||W − Ŵ||² / ||W||² of N(0, 1) and of real weights, beside the bits that are stored; *dB* "
        "is the first one above Shannon's bound 4^−bits, lower is better at any bits. *importances of 1*: a matrix "
        "that knows nothing, where llama.cpp weighs errors by the weights' own size without one, or demands one. "
        f"Commit {r['commit'][:10]}. `python -m bench.nearest_speed`",
        "",
        "| | bits | N(0, 1) | dB | real weights | whole | rounding | nearest point |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(whole["rows"].items(), key=lambda item: item[1]["bits"]):
        real = "" if row["real error"] is None else f"{row['real error']:.3g}"
        decibels = 10 * math.log10(row["error"] * 4 ** row["bits"])
        speeds = (
            f"{row[part][1]:,.{0 if row[part][1] >= 100 else 1}f}" if part in row else ""
            for part in ("whole", "quantize_nearest", "nearest point")
        )
        lines.append(
            f"| {name} | {row['bits']:.3f} | {row['error']:.3g} | {decibels:.2f} | {real} | {' | '.join(speeds)} |"
        )
    lines += ["", "The search alone, of grids as hard to search as the packaged ones:", ""]
    lines += ["| | native | torch reference |", "|---|---|---|"]
    for name, row in r["threads"]["1"].items():
        lines.append(f"| {name} | {row['native'][1]:.0f} | {row['reference'][1]:.2g} |")
    return [*lines, ""]


def all_lines() -> list[str]:
    return [*grids(), *weights(), *sensitivities(), *linearity(), *streaming(), *speed()]
