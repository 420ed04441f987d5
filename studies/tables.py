"""Writes docs/results.md and README's tables from the JSON results: no figure there is typed by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.record import RESULTS as SPEEDS
from studies import tables_binary, tables_peers, tables_readme, tables_tasks, tables_weights
from studies.experiment import measured

OUT = Path(__file__).resolve().parents[1] / "docs" / "results.md"
HEAD = """\
# Results

Made by `python -m studies.tables` from the JSON rows in [studies/results](../studies/results) and
[bench/results](../bench/results); each measurement names its commit and machine. ref-llama is the demo model in
`assets/demo-model`. The other three models, and the text files that the tables name, are not in the project: name your
own text with `--text FILE`; `bench/models.py` fetches real models. All scores go through the packed KV cache in chunks.
*Gap*: nats per token lost against the original, paired over sequences; *KL*: to the original, nats per token; *top-1*:
how often the most likely token is the same; *bits*: of the quantized linears for each of their original weights, scales
and expansion included. Where losses are compared, embedding and head keep 16 bits unless the table says otherwise. ± is
one standard error over sequences; seconds are of a busy machine, one thread, and compare only roughly. Methods: `rtn`
rounds to nearest without rotation; `quarot` is QuaRot with clips of 1.0; `quarot-clipped` with 0.9 for inputs and
asymmetric keys and values at 0.95; `paley` is a preset without a method, as it is; `gbs` has rotations folded into the
weights and searches clip ratios, as presets without a method did before 2026-11-30.
"""


def plus(row: dict, key: str, digits: int = 4) -> str:
    """A figure and its standard error."""
    return f"{row[key]:.{digits}f} ± {row[key + '_stderr']:.{digits}f}"


def quality(model: str, r: dict) -> list[str]:
    n = r["sequences"]
    lines = [
        f"## {model}",
        "",
        f"{r['parameters']:,} parameters; original perplexity {r['original']['perplexity']:.3f} on {n['test']} "
        f"sequences of {r['seq_len']} from {r['text']['test']}; {n['calibration']} sequences for calibration, "
        f"{n['search']} for the search. "
        f"Newest rows of commit {r['commit'][:10]}, each row's own in the file. "
        "`python -m studies.quality MODEL --text FILE`",
        "",
        "| | perplexity | gap | KL | top-1 | bits | work of the linears | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in r["rows"].items():
        seconds = sum(row["seconds"].values())
        lines.append(
            f"| {name} | {plus(row, 'perplexity', 3)} | {plus(row, 'gap')} | {plus(row, 'kl')} "
            f"| {row['top1_agreement']:.1%} | {row['bits']:.2f} "
            f"| × {row['linear_flops_ratio']:.2f} | {seconds:.0f} |"
        )
    return [*lines, ""]


def search_cost() -> list[str]:
    lines = ["## The search: the paper's algorithm against ours", ""]
    for r in measured("search-cost").values():
        lines += [
            f"{r['model']} at {r['bits']} bits from unclipped integer grids, {r['search_tokens']:,} search tokens, the "
            f"same quantized weights for all rows; not searched: gap {plus(r['not searched'], 'gap')}. Work is "
            f"block-forwards × tokens. The paper's exact algorithm takes {r['work_ratio']:.1f} times our work and "
            f"{r['time_ratio']:.1f} times our time. Commit {r['commit'][:10]}.",
            "",
            "| | gap | KL | perplexity | work | seconds | trials |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in r["rows"].items():
            lines.append(
                f"| {name} | {plus(row, 'gap')} | {plus(row, 'kl')} | {plus(row, 'perplexity', 3)} "
                f"| {row['work']:,} | {row['seconds']:.0f} | {row['trials']} |"
            )
        lines.append("")
    return lines if len(lines) > 2 else []


def outer() -> list[str]:
    """Embedding and head at fewer bits, alone and above quantized blocks."""
    found = [r for base in ("", "-w4a16") for r in measured(f"outer{base}").values()]
    lines = [
        "## Embedding and head",
        "",
        "Each row is a preset, whose e and h are the bits of embedding and head; w16a16 quantizes nothing else.",
        "*Error*: relative squared error of the embedding, and of a head of its own. Bytes are those of all tensors on",
        "disk. `python -m studies.outer MODEL --text FILE`",
        "",
    ]
    for r in found:
        lines += [
            f"**{r['model']}**, {'one weight for both' if r['tied'] else 'a weight each'}, on {r['sequences']['test']} "
            f"sequences of {r['seq_len']} from {r['text']['test']}. Commit {r['commit'][:10]}.",
            "",
            "| | gap | KL | perplexity | bytes | bits of all weights | error |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in r["rows"].items():
            errors = ", ".join(f"{e:.2g}" for e in row["rel_error"].values())
            lines.append(
                f"| {name} | {plus(row, 'gap')} | {plus(row, 'kl')} | {plus(row, 'perplexity', 3)} "
                f"| {row['bytes']:,} | {row['bits_per_weight']:.2f} | {errors} |"
            )
        lines.append("")
    return lines if found else []


def cost() -> list[str]:
    file = SPEEDS / "cost.json"
    if not file.exists():
        return []
    r = json.loads(file.read_text())
    lines = [
        "## Cost of quantizing",
        "",
        f"Random LLaMAs at W3A3KV3 without search, whole command, {r['threads']} thread(s). Commit {r['commit'][:10]}. "
        "`python -m bench.cost`",
        "",
        "| layers | hidden | calibration tokens | seconds | model, float32 | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for group in ("by_layers", "by_tokens", "by_size"):
        for m in r[group]:
            lines.append(
                f"| {m['layers']} | {m['hidden']} | {m['tokens']:,} | {m['seconds']:.1f} "
                f"| {m['model_bytes_float32'] / 1e6:.0f} MB | {m['peak_bytes'] / 1e6:.0f} MB |"
            )
    return [*lines, ""]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = [HEAD]
    for model, r in measured("quality").items():
        lines += quality(model, r)
    lines += (
        tables_tasks.all_lines()
        + tables_peers.all_lines()
        + outer()
        + search_cost()
        + cost()
        + tables_weights.all_lines()
        + tables_binary.all_lines()
    )
    tables_readme.renew()
    OUT.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
