"""docs/results.md: tasks of lm-eval, from the rows of `studies.quality` that answered them."""

from __future__ import annotations

import math

from studies.experiment import measured

__all__ = ["all_lines", "means"]

METRIC = {"lambada_openai": "acc", "winogrande": "acc"}  # acc_norm of the others


def _chosen(row: dict) -> list[dict]:
    """One metric of each task."""
    return [score for score in row["tasks"] if score["metric"] == METRIC.get(score["task"], "acc_norm")]


def _cells(scores: list[dict], key: str) -> str:
    return " | ".join(f"{100 * score[key]:.1f}" for score in scores)


def _mean(scores: list[dict], key: str) -> float:
    return math.fsum(score[key] for score in scores) / len(scores)


def means(row: dict) -> tuple[float, float] | None:
    """Of all tasks, in per cent, of the quantized model and of the original; None if none was asked."""
    if "tasks" not in row:
        return None
    scores = _chosen(row)
    return 100 * _mean(scores, "score"), 100 * _mean(scores, "original")


def _gap(scores: list[dict]) -> str:
    """The mean of the tasks' differences; their errors are of other documents each, so they add as squares."""
    stderr = math.sqrt(math.fsum(score["gap_stderr"] ** 2 for score in scores)) / len(scores)
    return f"{100 * _mean(scores, 'gap'):+.1f} ± {100 * stderr:.1f}"


def _table(model: str, r: dict) -> list[str]:
    rows = {name: row for name, row in r["rows"].items() if "tasks" in row}
    if not rows:
        return []
    first = _chosen(next(iter(rows.values())))
    tasks = [score["task"] for score in first]
    limits = sorted({row["limit"] for row in rows.values()})
    lines = [
        f"**{model}**, `--limit {limits[0]}`; {r['sequences']['calibration']} sequences of {r['seq_len']} from "
        f"{r['text']['calibration']} for calibration. KL on {r['sequences']['test']} sequences from "
        f"{r['text']['test']}.",
        "",
        "| | " + " | ".join(tasks) + " | mean | lost | KL |",
        "|---|" + "---|" * (len(tasks) + 3),
        f"| original | {_cells(first, 'original')} | {100 * _mean(first, 'original'):.1f} | | |",
    ]
    for name, row in rows.items():
        scores = _chosen(row)
        lines.append(
            f"| {name} | {_cells(scores, 'score')} | {100 * _mean(scores, 'score'):.1f} | {_gap(scores)} "
            f"| {row['kl']:.3f} ± {row['kl_stderr']:.3f} |"
        )
    return [*lines, ""]


def all_lines() -> list[str]:
    tables = [line for model, r in measured("quality").items() for line in _table(model, r)]
    if not tables:
        return []
    return [
        "## Tasks",
        "",
        "Per cent right by lm-eval, through the packed KV cache, on the first documents of each task: acc_norm of",
        "arc_easy, arc_challenge, hellaswag and piqa, acc of the others. *Lost*: the mean difference to the original",
        "on the same documents, ± one standard error. `python -m studies.quality MODEL --task-data FOLDER --limit N`",
        "",
        *tables,
    ]
