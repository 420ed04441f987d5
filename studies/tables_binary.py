"""The part of docs/results.md on binary weights: errors on Gaussian values, methods and ablations, kernels."""

from __future__ import annotations

from bench.record import RESULTS as SPEEDS
from studies.experiment import measured, read
from studies.tables_weights import commits

__all__ = ["all_lines"]


def gaussian() -> list[str]:
    """Relative squared error on N(0, 1)."""
    if (found := read("binary-gaussian.json")) is None:
        return []
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    lines = [
        "## Binary weights on Gaussian values",
        "",
        f"Relative squared error on {found['samples']:,} samples, centroids and scales in float16.",
        "`python -m studies.binary_table`",
        "",
        "| group | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for size in dict.fromkeys(row["group_size"] for row in found["rows"]):
        rows = {row["name"]: row for row in found["rows"] if row["group_size"] == size}
        cells = [f"{rows[name]['t2']:.4f}" for name in names]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def methods() -> list[str]:
    """A row a method or a variant, a column a model: the gap, and the bits that are stored."""
    found = measured("binary")
    if not found:
        return []
    names = list(dict.fromkeys(name for data in found.values() for name in data["rows"]))
    lines = [
        "## Binary weights, four-bit inputs and caches",
        "",
        "Loss gained in nats per token ± one standard error, KL to the original, and in brackets the bits stored for",
        "each weight of the quantized layers: codes, centroids or scales, INT8 columns. **No row has one bit a",
        "weight**: they have 2.0 to 3.6. Inputs and KV cache have 4 bits (16 in the last row). Groups are the divisor",
        "of a width nearest to 128, 64 or 256, which for widths of 64 and 128 is the width; where INT8 columns are",
        "kept they are 1/32 of a hidden state. `w1a4, before` is the reconstruction as it was first built, with INT8",
        "columns and no rotation; the rows after it change one thing in it. `w1a4` is the preset, which those rows",
        "decided, without the diagonal that it has got since. `paley w?a4kv4` is our default at those bits, without",
        "search; it and `higgs` have inputs on gauss4",
        "with one scale a token, and rtn, gptq and atom-like have caches as their presets have them. Perplexities:",
        "[the JSON rows](../studies/results).",
        "",
    ]
    for model, data in found.items():
        n = data["sequences"]
        lines.append(
            f"{model}: {n['test']} test sequences, {n['calibration']} for calibration, "
            f"rows of {commits(data)}. "
            "`python -m studies.binary MODEL --text FILE`"
        )
        lines.append("")
    lines += ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        rows = [data["rows"].get(name) for data in found.values()]
        lines.append(f"| {name} | " + " | ".join(_cell(row) for row in rows) + " |")
    return [*lines, ""]


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['gap']:.3f} ± {row['gap_stderr']:.3f}, KL {row['kl']:.3f} ({row['bits']:.2f})"


def speed() -> list[str]:
    """Milliseconds of one product."""
    if (found := read("planes-speed.json", SPEEDS)) is None:
        return []
    results = found["results"]
    names = list(dict.fromkeys(name for row in results.values() for name in row if "ms" in row[name]))
    lines = [
        "## Speed of binary planes",
        "",
        f"Milliseconds, median ({found['machine']}, {found['level']}), groups of {found['group_size']}, weights",
        "from memory. popcount, dots and tables give the same bits; tables are what runs. With two threads and",
        "little work the threads that torch keeps spinning are in the way: small products take one.",
        f"Commit {found['commit'][:10]}. `python -m bench.planes_speed`",
        "",
        "| out × in, tokens, threads | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for shape, row in results.items():
        cells = [f"{row[name]['ms']:.3g}" if name in row else "" for name in names]
        lines.append(
            f"| {shape.replace('x', ' × ').replace(' tokens', '').replace(' threads', '')} | "
            + " | ".join(cells)
            + " |"
        )
    return [*lines, ""]


def all_lines() -> list[str]:
    return gaussian() + methods() + speed()
