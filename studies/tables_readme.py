"""README's tables: what real models lose, beside others, from the JSON results."""

from __future__ import annotations

from pathlib import Path

from studies import tables_peers, tables_tasks
from studies.experiment import measured

__all__ = ["renew"]

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- made by studies/tables.py -->", "<!-- end -->"
NAMES = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B", "gemma-3-270m": "Gemma-3-270m"}
SIZES = ("trellis3, GPTQ, e4", "trellis4, GPTQ, e5", "trellis5, GPTQ, e6")
METHODS = {"quarot": "QuaRot", "gbs": "GBS, folded rotations", "paley": "Paley"}
WEIGHTS = """\
**Weights alone, at equal bytes.** KL to the original (± one standard error) on 8 × 512 tokens of WikiText-2, all
tensors counted; llama.cpp has the importance matrix of the text that ours calibrates on, 16 × 512 tokens. The models
are equals of the published ones with other weights, so that no tool profits from the file that a model came in.
"""
ALL = """\
**Weights, activations and cache.** The same measure on the published models, embedding and head in 16 bits; the mean of
six tasks of lm-eval, through the quantized cache, in per cent.
"""


def _kl(row: dict) -> str:
    return f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}"


def _cell(name: str | None, theirs: dict[str, dict]) -> str:
    if name is None:
        return "none that was measured"
    return f"{name.removeprefix('llama.cpp ')}: {theirs[name]['bits']:.2f} bits, {_kl(theirs[name])}"


def weights() -> list[str]:
    """Ours at three sizes, llama.cpp's best that is no larger, and its smallest that loses no more."""
    lines = [
        WEIGHTS,
        "| | bits | KL | llama.cpp at no more bits | llama.cpp for no more loss |",
        "|---|---|---|---|---|",
    ]
    found = measured("peers")
    for model, named in NAMES.items():
        rows = found.get(model, {"rows": {}})["rows"]
        theirs = {name: row for name, row in rows.items() if name.startswith("llama.cpp")}
        for size in SIZES:
            if size not in rows or not theirs:
                continue
            row = rows[size]
            cells = [_cell(name, theirs) for name in tables_peers.nearest(row, theirs)]
            lines.append(f"| {named} | {row['bits']:.2f} | **{_kl(row)}** | {' | '.join(cells)} |")
    return [*lines, ""]


def everything() -> list[str]:
    lines = [ALL, "| | | KL | top-1 | tasks |", "|---|---|---|---|---|"]
    for model, r in measured("quality").items():
        if model not in NAMES:
            continue
        for width in ("w4a4kv4", "w3a3kv3"):
            for method, named in METHODS.items():
                if (row := r["rows"].get(f"{width} {method}")) is None:
                    continue
                tasks = tables_tasks.means(row)
                said = "" if tasks is None else f"{tasks[0]:.1f} of {tasks[1]:.1f}"
                lines.append(
                    f"| {NAMES[model]} {width.upper()} | {named} | {_kl(row)} | {row['top1_agreement']:.0%} | {said} |"
                )
    return [*lines, ""]


def renew() -> None:
    """Writes the part between the README's markers."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [*weights(), *everything()]
    README.write_text(before + BEGIN + "\n" + "\n".join(lines).rstrip() + "\n" + END + after)
