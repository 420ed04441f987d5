"""Tasks of lm-eval: a model's scores and, against the original, the differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paley.core.errors import PaleyError, Setting
from paley.eval.tasks import Scores, TaskScore, check_tasks, compare_tasks, run_tasks
from paley.model.folders import load_tokenizer, resolve
from paley.model.loading import open_source
from paley.pipeline.any_model import check_device, load_any
from paley.pipeline.monitor import Monitor
from paley.pipeline.score import check_origin

__all__ = ["score_tasks"]


def score_tasks(
    model: str | Path,
    tasks: Sequence[str],
    folder: Path | None,
    against: str | Path | None = None,
    *,
    limit: int | None = None,
    device: str = "cpu",
    monitor: Monitor | None = None,
) -> list[TaskScore]:
    """Scores a quantized folder, or any model, on tasks whose files are in `folder`, and the original before it."""
    monitor = monitor or Monitor()
    check_device(device)
    if not tasks:
        raise PaleyError(Setting("tasks"), ": names none")
    check_tasks(tasks, folder)
    assert folder is not None
    originals = None
    if against is not None:
        check_origin(model, against, open_source(against).fingerprint)
        originals = _run(against, "original", tasks, folder, limit, device, monitor)
    return compare_tasks(_run(model, "model", tasks, folder, limit, device, monitor), originals)


def _run(
    model: str | Path, what: str, tasks: Sequence[str], folder: Path, limit: int | None, device: str, monitor: Monitor
) -> Scores:
    found: Scores = {}
    monitor.stage(f"loading the {what}", 1)
    loaded, tokenizer = load_any(model, device), load_tokenizer(resolve(str(model)))
    for task in tasks:
        monitor.stage(f"{task}, {what}", 100)
        seen = 0

        def advance(done: int, total: int) -> None:
            nonlocal seen
            while seen < 100 * done // total:
                monitor.step()
                seen += 1

        found |= run_tasks(loaded, tokenizer, [task], folder, limit, advance)
    return found
