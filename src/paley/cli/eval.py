"""`paley eval`: scores a model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, peak_memory
from paley.core.errors import PaleyError, Setting

__all__ = ["eval_verb"]


@verb("eval")
def eval_verb(
    model: options.AnyModel,
    against: options.Against = None,
    data: options.Data = None,
    sequences: options.Sequences = None,
    seq_len: options.SeqLen = None,
    tasks: options.Tasks = None,
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    device: options.Device = "cpu",
    workers: options.Workers = 1,
    ray: options.Ray = False,
    ray_address: options.RayAddress = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity through the quantized cache and, against the original, what was lost.

    Without --data the text is what the model's plan set apart for testing, or for other models the test part
    of Python's own documentation. A text that the plan was tuned on is refused.

    With --workers or --ray, sequences are shared; each worker holds the model and uses one thread.

    With --tasks it answers questions instead, those of lm-eval (`pip install "paley[tasks]"`) on files in
    --task-data, through the quantized cache, too.

    Example: `paley eval llama-w4 --against ./llama --data book.txt`
    """
    from paley.cli import display
    from paley.cli.progress import watching

    start = time.monotonic()
    cluster = options.cluster(ray, ray_address)
    if tasks is not None:
        if workers > 1 or cluster is not None:
            raise PaleyError(
                Setting("tasks"),
                ": are answered by one process",
                remedy=("leave ", Setting("workers"), " and --ray out"),
            )
        _tasks(model, against, tasks, task_data, limit, device, as_json)
        return
    for name, value in (("task_data", task_data), ("limit", limit)):
        if value is not None:
            raise PaleyError(Setting(name), ": is for tasks", remedy=("name some with ", Setting("tasks")))
    with watching() as monitor:
        result = paley.score(
            model, against, data=data, sequences=sequences, seq_len=seq_len, device=device, workers=workers,
            ray=cluster, monitor=monitor,
        )  # fmt: skip
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"model": model, "against": against, **asdict(cost), **result.to_dict()})
        return
    display.show(display.eval_table(result, cost))
    line(display.scored_on(result))


def _tasks(
    model: str, against: str | None, names: str, folder: Path | None, limit: int | None, device: str, as_json: bool
) -> None:
    from paley.cli import display
    from paley.cli.progress import watching
    from paley.eval.figures import with_error
    from paley.pipeline.task_scores import score_tasks

    with watching() as monitor:
        found = score_tasks(
            model, [name.strip() for name in names.split(",") if name.strip()], folder, against, limit=limit,
            device=device, monitor=monitor,
        )  # fmt: skip
    if as_json:
        display.emit({"model": model, "against": against, "limit": limit, "tasks": [asdict(score) for score in found]})
        return
    rows = []
    for score in found:
        gap = "" if score.gap is None else with_error(100 * score.gap, _percent(score.gap_stderr), "+.2f")
        original = "" if score.original is None else f"{100 * score.original:.2f}"
        here = with_error(100 * score.score, _percent(score.stderr), ".2f")
        rows.append((score.task, score.metric, f"{score.documents:,}", original, here, gap))
    header = ("task", "metric", "documents", "original, %", "this model, %", "difference")
    display.show(display.table(header, rows, left=2))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
