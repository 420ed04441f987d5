"""Quality of every method at equal bits, in one run: writes studies/results/quality-MODEL.json.

python -m studies.quality MODEL [--text FILE] [--widths w4a4kv4,w3a3kv3] [--expand 0,...] [--task-data FOLDER --limit N]
Each row: perplexity ± standard error, paired gap in nats, KL, top-1 agreement, all through the packed KV cache; with
--task-data also the scores of lm-eval's tasks, through the same cache, and the original's on the same documents.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path

from studies.experiment import BLOCKS_ALONE, Experiment

from paley.eval.tasks import TASKS, compare_tasks, run_tasks
from paley.recipe import Recipe, apply_settings, preset


def rows(width: str, expansions: list[str]) -> dict[str, tuple[Recipe, str]]:
    """name -> recipe and the command that gives it."""
    found = {name: preset(f"{name}-{width}") for name in ("rtn", "quarot", "quarot-clipped")}
    labelled = {name: (recipe, f"--preset {name}-{width}") for name, recipe in found.items()}
    labelled["paley"] = (preset(width + BLOCKS_ALONE), f"--preset {width + BLOCKS_ALONE}")
    searched = apply_settings(preset(width + BLOCKS_ALONE), ["search.method=gbs"])
    labelled["paley, searched"] = (searched, f"--preset {width + BLOCKS_ALONE} --set search.method=gbs")
    searching = f"gbs-{width}{BLOCKS_ALONE}"
    for expand in expansions:
        flags = ["search.method=none", f"expand={expand}"]
        name = "gbs without search" + (f" + {expand} columns" if expand != "0" else "")
        labelled[name] = (apply_settings(preset(searching), flags), f"--preset {searching} --set {' '.join(flags)}")
    labelled["gbs"] = (preset(searching), f"--preset {searching}")
    return labelled


class Questions:
    """What lm-eval's tasks ask, and what the original answers; nothing without a folder of documents."""

    def __init__(self, experiment: Experiment, folder: Path | None, limit: int):
        self.folder, self.limit = folder, limit
        self.tokenizer = experiment.source.tokenizer()
        if folder is not None:
            self.originals = self._ask(experiment.source.load().float())

    def _ask(self, model):
        assert self.folder is not None
        return run_tasks(model, self.tokenizer, list(TASKS), self.folder, self.limit)

    def row(self, model) -> dict:
        if self.folder is None:
            return {}
        scores = compare_tasks(self._ask(model), self.originals)
        return {"tasks": [asdict(score) for score in scores], "limit": self.limit}


def measure(experiment: Experiment, questions: Questions, recipe: Recipe, flags: str) -> dict:
    found = experiment.quantize(recipe)
    work = _linear_work(found.model) / _linear_work(experiment.source.skeleton)
    made = {"linear_flops_ratio": work, "trials": len(found.decision.trace), "flags": flags}
    return found.row | made | questions.row(found.model)


def _linear_work(model) -> int:
    """Multiplications per token in the linears of the blocks and the head."""
    return sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))


def main() -> None:
    parser = Experiment.parser(__doc__, calibration=128, search=32, test=160)
    parser.add_argument("--widths", default="w4a4kv4,w3a3kv3")
    parser.add_argument("--expand", default="0", help="columns added to the residual stream, comma-separated")
    parser.add_argument("--task-data", type=Path, help="a folder with the documents of lm-eval's tasks")
    parser.add_argument("--limit", type=int, default=100, help="documents of a task, 100 by default")
    arguments = parser.parse_args()
    experiment = Experiment("quality", arguments)
    questions = Questions(experiment, arguments.task_data, arguments.limit)
    for width in arguments.widths.split(","):
        for name, (recipe, flags) in rows(width, arguments.expand.split(",")).items():
            experiment.row(f"{width} {name}", functools.partial(measure, experiment, questions, recipe, flags))


if __name__ == "__main__":
    main()
