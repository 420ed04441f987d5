"""Tasks of lm-evaluation-harness, on files that lie here, through the quantized cache.

lm-eval's own models score each text in one forward without a cache, so that a quantized cache changes nothing. Here
text passes through a PackedKVCache, whose codes attention reads back. Choices of one question share the reading of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paley.core.errors import PaleyError, Setting, nearest_name
from paley.core.reading import read_text
from paley.eval.scoring import CHUNK
from paley.kernels.floats import quickly
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.loading import context_of
from paley.model.pieces import pieces_of

__all__ = ["TASKS", "TaskScore", "check_tasks", "compare_tasks", "run_tasks"]

Row = dict[str, Any]
Scores = dict[str, dict[str, list[float]]]  # task -> metric -> the value of each document


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        "question": row["question"], "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["label"]],
    }  # fmt: skip


# Task -> (its file, its split in lm-eval, a row of the file as lm-eval's task wants it).
TASKS: Mapping[str, tuple[str, str, Callable[[Row], Row]]] = {
    "arc_easy": ("arc_easy_test.jsonl", "test", _arc),
    "arc_challenge": ("arc_challenge_test.jsonl", "test", _arc),
    "hellaswag": ("hellaswag_val_1000.jsonl", "validation", lambda row: row | {"label": str(row["label"])}),
    "lambada_openai": ("lambada_openai_test.jsonl", "test", lambda row: row),
    "piqa": ("piqa_validation.jsonl", "validation", lambda row: row),
    "winogrande": ("winogrande_xl_validation.jsonl", "validation", lambda row: row),
}

_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "lambada_openai": "lambada",
}  # of lm-eval, if not the task's name


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; what compares is None without the original. gap: score - original, its stderr paired."""

    task: str
    metric: str
    documents: int
    score: float
    stderr: float | None
    original: float | None = None
    gap: float | None = None
    gap_stderr: float | None = None


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Raises for an unknown task, a missing file, and a missing lm-eval."""
    for name in names:
        if name not in TASKS:
            raise PaleyError(
                f"tasks: {name!r} is none of {', '.join(TASKS)}{nearest_name(name, TASKS)}"
            )  # fmt: skip
    if folder is None:
        raise PaleyError(
            "tasks: lie in files here, and none are downloaded",
            remedy=(
                "name their folder with ",
                Setting("task_data"),
                f" ({', '.join(TASKS[name][0] for name in names)})",
            ),
        )
    if gone := [TASKS[name][0] for name in names if not (folder / TASKS[name][0]).is_file()]:
        raise PaleyError(f"{folder}: has no {', '.join(gone)}", remedy="a line of JSON for each document")
    if find_spec("lm_eval") is None:
        raise PaleyError("tasks: lm-eval is not installed", remedy='pip install "paley[tasks]"')


@quickly
def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], folder: Path,
    limit: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> Scores:  # fmt: skip
    """limit: the first so many documents of each task. progress is called with (texts scored, texts) of each task."""
    check_tasks(names, folder)
    with _offline():
        import lm_eval.tasks
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Only the folders of these tasks: it would read thousands of files.
        here = Path(lm_eval.tasks.__file__).parent
        folders = sorted({str(here / _FOLDERS.get(name, name)) for name in names})
        manager = TaskManager(include_path=cast(Any, folders), include_defaults=False)
        bridge = _bridge(model, tokenizer, progress)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars
            tasks = [_task(manager, name, folder) for name in names]
            found = cast(Any, simple_evaluate)(
                model=bridge, tasks=tasks, limit=limit, bootstrap_iters=0, log_samples=True, task_manager=manager
            )
    samples = {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}
    return {
        name: {
            metric: [float(sample[metric]) for sample in rows] for metric in ("acc", "acc_norm") if metric in rows[0]
        }
        for name, rows in samples.items()
    }


def compare_tasks(scores: Scores, originals: Scores | None = None) -> list[TaskScore]:
    """Means and standard errors, of differences document by document if there is an original."""
    found = []
    for task, metrics in scores.items():
        for metric, values in metrics.items():
            mean, stderr = _mean(values)
            if originals is None:
                found.append(TaskScore(task, metric, len(values), mean, stderr))
                continue
            others = originals[task][metric]
            gap, gap_stderr = _mean([a - b for a, b in zip(values, others, strict=True)])
            found.append(TaskScore(task, metric, len(values), mean, stderr, _mean(others)[0], gap, gap_stderr))
    return found


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    mean, n = math.fsum(values) / len(values), len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def _task(manager: Any, name: str, folder: Path) -> Any:
    """lm-eval's own task, on other documents; its public functions read those of the Hub alone."""
    splits = {f"{split}_split": None for split in ("training", "validation", "test") if split != TASKS[name][1]}
    changes = splits | {"custom_dataset": _dataset(name, folder)}
    return manager._factory.build(manager.task_index[name], overrides=changes, registry=manager.task_index)


def _dataset(name: str, folder: Path) -> Callable[..., Any]:
    """What lm-eval calls for a task's documents."""
    file, split, convert = TASKS[name]

    def make(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict  # type: ignore[import-not-found]

        path = folder / file
        try:
            lines = read_text(path, "task file").split("\n")
            rows = [convert(json.loads(line)) for line in lines if line.strip()]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, PaleyError):
                raise
            raise PaleyError(f"{path}: is no file of the task {name} ({type(error).__name__}: {error})") from error
        return DatasetDict({split: Dataset.from_list(rows)})

    return make


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """lm-eval and `datasets` ask the Hub for nothing, and their caches and bars stay out of sight."""
    wanted = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _bridge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int, int], None] | None
) -> Any:
    """An lm-eval model on ours."""
    from lm_eval.api.model import TemplateLM

    class Bridge(TemplateLM):
        tokenizer_name = "paley"  # type: ignore[assignment]

        @property
        def eot_token_id(self) -> int:
            return cast(int, tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return cast(int, tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return cast(list[int], cast(Any, tokenizer)(string, verbose=False, **special)["input_ids"])

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            texts = [(tuple(context), tuple(answer)) for _, context, answer in requests]
            return log_likelihoods(model, texts, progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise PaleyError("tasks: those that score whole documents are not supported; `paley eval` does")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise PaleyError("tasks: those that generate text are not supported")

    return Bridge()


Text = tuple[tuple[int, ...], tuple[int, ...]]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, texts: Sequence[Text], progress: Callable[[int, int], None] | None = None
) -> list[tuple[float, bool]]:
    """texts of (context, answer), tokens of both -> (log-likelihood of the answer, whether it is what is likeliest).

    Each context is read once through a cache, in pieces; its answers are read behind it side by side. A model that
    cannot go on from a cache reads context and answer at once.
    """
    limit = context_of(model.config)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, answer) in enumerate(texts):
        keep = len(context) if limit is None else max(1, limit - len(answer) + 1)
        by_context.setdefault(context[-keep:], []).append(index)
    done = 0
    for context, indices in by_context.items():
        answers = [texts[index][1] for index in indices]
        for index, answer, logits in zip(indices, answers, _logits(model, context, answers), strict=True):
            wanted = torch.tensor(answer, device=logits.device)
            logs = logits.log_softmax(-1).gather(-1, wanted[:, None])
            found[index] = float(logs.double().sum()), bool((logits.argmax(-1) == wanted).all())
            done += 1
        if progress is not None:
            progress(done, len(texts))
    return found


def _logits(model: PreTrainedModel, context: tuple[int, ...], answers: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """float32 [tokens, vocabulary] that predict each answer."""
    pieces, device = pieces_of(model), model.device
    if not pieces.cache:
        for answer in answers:
            ids = torch.tensor([[*context, *answer[:-1]]], device=device)
            yield model(ids, use_cache=False).logits[0, len(context) - 1 :].float()
        return
    cache, start = PackedKVCache(model), len(context) - 1
    known = cache_argument(model, cache)
    read = torch.tensor([context[:-1]], device=device, dtype=torch.int64)
    step = CHUNK if pieces.at_once else max(start, 1)
    for at in range(0, start, step):
        for part, more in pieces.parts(read[:, at : at + step], at):
            model.base_model(part, use_cache=True, **more, **known)
    cache.reorder_cache(torch.zeros(len(answers), dtype=torch.int64))  # the context once for each answer
    longest = max(map(len, answers))  # nothing looks at what stands behind an answer
    ids = torch.tensor(
        [[context[-1], *answer[:-1], *[0] * (longest - len(answer))] for answer in answers], device=device
    )
    rows = [model(part, use_cache=True, **more, **known).logits for part, more in pieces.parts(ids, start)]
    for answer, logits in zip(answers, torch.cat(rows, 1), strict=True):
        yield logits[: len(answer)].float()
