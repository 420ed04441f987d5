"""Between the verbs' arguments and the library: the models, and the text to score."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from paley import hf
from paley.cli.process import naming
from paley.core.errors import PaleyError
from paley.core.reading import read_json
from paley.data import TokenBlocks
from paley.eval.perplexity import EvalResult, evaluate
from paley.eval.reference import Reference
from paley.format.spec import QUANT_METHOD
from paley.model.loading import check_seq_len, load_tokenizer, open_source, read_config, resolve
from paley.ops.matmul import EXACT
from paley.pipeline import Monitor
from paley.pipeline.texts import is_tuned_on, test_blocks
from paley.plan import Plan
from paley.recipe import Recipe, Test

__all__ = [
    "check_device",
    "evaluate_model",
    "is_paley",
    "load_model",
    "scored_text",
]

# Settings that errors about a text name, as `paley eval` calls them.
_AS_OPTIONS = {"test.sequences": "--sequences", "test.seq_len": "--seq-len", "test.source": "--data"}


def check_device(name: str) -> str:
    """-> name, if torch can put a model there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PaleyError(f"--device {name}: no such device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise PaleyError(f"--device {name}: is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise PaleyError(f"--device {name}: torch sees {count} CUDA devices here; use cpu")
    return name


def is_paley(folder: Path) -> bool:
    """Whether config.json says that the model is in our format; False where it cannot be read."""
    try:
        section = read_json(folder / "config.json")["quantization_config"]
        return section["quant_method"] == QUANT_METHOD
    except (PaleyError, LookupError, TypeError):
        return False


def load_model(model: str, device: str, *, kernels: bool = False) -> PreTrainedModel:
    """A Paley folder, its weights unpacked for speed, or an ordinary checkpoint (folder or Hub name).

    kernels: leave those weights packed that a native kernel multiplies as they are; scores do without, so that they are
    the same on every machine.
    """
    path = resolve(model)
    if is_paley(path):
        return hf.load(path, device=device, product="auto" if kernels else EXACT)
    return open_source(path).load(device=device)


def scored_text(model: str, data: str | None, sequences: int | None, seq_len: int | None) -> TokenBlocks:
    """The text to score `model` on: `data`, or what its plan set apart for testing, or pydoc's test part.

    Raises where the model was tuned on `data`, as its plan says.
    """
    path = resolve(model)
    plan = Plan.load(path / "plan.json") if (path / "plan.json").is_file() else None
    if plan is not None and data is not None and is_tuned_on(plan.recipe, data):
        raise PaleyError(
            f"--data {data}: {model} was tuned on this text, and a score on it would flatter; leave --data out for "
            "the text that its plan set apart, or give another one"
        )
    recipe = plan.recipe if plan is not None else Recipe()
    given = {"source": data, "sequences": sequences, "seq_len": seq_len}
    changes = {name: value for name, value in given.items() if value is not None}
    test = (recipe.test or Test()).model_copy(update=changes)
    with naming(_AS_OPTIONS):
        check_seq_len(read_config(path), {"test.seq_len": test.seq_len})
        return test_blocks(recipe.model_copy(update={"test": test}), load_tokenizer(path))


def evaluate_model(model: str, against: str | None, blocks: TokenBlocks, device: str, monitor: Monitor) -> EvalResult:
    """Scores `model` on test blocks; the original, `against`, is measured first, and gone by then."""
    reference = None
    if against is not None:
        monitor.stage("measuring the original", 1)
        reference = Reference.of(open_source(against).load(device=device), blocks)
    monitor.stage("loading the model", 1)
    loaded = load_model(model, device)
    monitor.stage("evaluating", len(blocks.ids))
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        for _ in range(done - seen):
            monitor.step()
        seen = done

    return evaluate(loaded, blocks, reference, progress=advance)
