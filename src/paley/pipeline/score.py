"""`paley.score`: perplexity of any model through its quantized cache and, against the original, what was lost."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from paley.core.errors import PaleyError, Setting, renaming
from paley.core.memory import give_back
from paley.core.reading import read_json
from paley.data import TokenBlocks
from paley.eval.perplexity import EvalResult, evaluate
from paley.eval.reference import Reference
from paley.model.folders import load_tokenizer, resolve
from paley.model.loading import check_seq_len, context_of, empty_model, open_source, read_config
from paley.model.pages import Turns, one_after_another
from paley.model.walk import sites_of
from paley.ops.matmul import EXACT
from paley.pipeline.any_model import check_device, is_paley, load_any
from paley.pipeline.monitor import Monitor
from paley.pipeline.paged import page_original, page_quantized
from paley.pipeline.pool import check_shared, pool_of
from paley.pipeline.shared_scores import shared_score
from paley.pipeline.texts import SELF, check_vocabulary, is_tuned_on, test_blocks
from paley.pipeline.worker_memory import of_scores, pages_pay
from paley.plan import VERSION, Plan
from paley.recipe import Recipe, Test

__all__ = ["check_origin", "score", "scored_text"]

# A recipe's settings, as `score` calls them.
_ARGUMENTS = {"test.sequences": "sequences", "test.seq_len": "seq_len", "test.source": "data"}


def score(
    model: str | Path,
    against: str | Path | None = None,
    *,
    data: str | None = None,
    sequences: int | None = None,
    seq_len: int | None = None,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    monitor: Monitor | None = None,
) -> EvalResult:
    """Scores a quantized folder, or any model; against: the original, measured first, and gone by then.

    On a CPU one block of a model at a time is in memory, unless the text is so long that this would take more.

    data: a text file, `pydoc`, or `hub:DATASET[:CONFIG][:SPLIT]`. Without it the text is what the model's plan set
    apart for testing, for other models the test part of Python's documentation. workers: processes that share the
    sequences, each with a model in memory and one thread; ray: the cluster whose workers do, as of `paley.quantize`.
    Errors: PaleyError, also for a text that the model was tuned on, as its plan says.
    """
    monitor = monitor or Monitor()
    check_device(device)
    check_shared(workers, ray, device)
    blocks = scored_text(model, data, sequences, seq_len, monitor)
    if workers > 1 or ray is not None:
        return _shared(model, against, blocks, workers, ray, monitor)
    reference = None
    if against is not None:
        monitor.stage("measuring the original", 1)
        source = open_source(against)
        check_origin(model, against, source.fingerprint)
        original, turns = _opened(source.path, blocks, device)
        reference = Reference.of(original, blocks, turns=turns)
        del original, turns
        give_back(models=True)
    monitor.stage("loading the model", 1)
    loaded, turns = _opened(resolve(str(model)), blocks, device)
    give_back()  # pieces that loading leaves between what stays: .4 of 1.8 GB on SmolLM2-135M
    monitor.stage("evaluating", len(blocks.ids))
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        for _ in range(done - seen):
            monitor.step()
        seen = done

    return evaluate(loaded, blocks, reference, progress=advance, turns=turns)


def _opened(path: Path, blocks: TokenBlocks, device: str) -> tuple[PreTrainedModel, Turns]:
    """A folder's model, and how forwards go through it: with a block in memory at a time, if that takes less of it."""
    tokens = blocks.ids.numel()
    if device == "cpu" and is_paley(path) and pages_pay(sites_of(empty_model(read_config(path))), tokens):
        return page_quantized(path, EXACT)
    if device == "cpu" and not is_paley(path):
        source = open_source(path)
        if source.has_pages and pages_pay(source.sites, tokens):
            return page_original(source)
    return load_any(path, device), one_after_another


def _shared(
    model: str | Path, against: str | Path | None, blocks: TokenBlocks, workers: int, ray: str | None, monitor: Monitor
) -> EvalResult:
    """As of `score`, by workers, which see the folders by their whole paths."""
    folders, fingerprint = [resolve(str(model)).resolve()], ""
    if against is not None:
        monitor.stage("checking the checkpoint", 1)
        source = open_source(against)
        check_origin(model, against, source.fingerprint)
        folders.append(source.path.resolve())
        fingerprint = source.fingerprint
        monitor.step()
    with pool_of(workers, ray, resumes=False) as pool:
        sites = sites_of(empty_model(read_config(folders[0])))
        pool.check(*folders, memory=of_scores(sites, blocks, compared=against is not None))
        original = str(folders[1]) if against is not None else ""
        return shared_score(str(folders[0]), original, fingerprint, blocks, pool, monitor)


def _plan(file: Path, data: str | None) -> Plan | None:
    """The plan of a folder; None if there is none, or one of an older Paley and a text is named anyway."""
    if not file.is_file():
        return None
    if (version := read_json(file).get("version")) == VERSION:
        return Plan.load(file)
    if data is None:
        raise PaleyError(
            f"{file}: is a plan of version {version}, which tells this Paley no text to score on",
            remedy=("name one with ", Setting("test.source")),
        )
    return None


def check_origin(model: str | Path, against: str | Path, fingerprint: str) -> None:
    """Raises if the model's plan says that it was made from another one than `against`."""
    file = resolve(str(model)) / "plan.json"
    made_from = read_json(file).get("fingerprint", fingerprint) if file.is_file() else fingerprint
    if made_from != fingerprint:
        raise PaleyError(
            f"{model}: was made from a model with fingerprint {str(made_from)[:16]}, {against} has {fingerprint[:16]}",
            remedy="compare with the model that it was made from",
        )


@renaming(_ARGUMENTS)
def scored_text(
    model: str | Path, data: str | None, sequences: int | None, seq_len: int | None, monitor: Monitor
) -> TokenBlocks:
    """The text that `score` scores on; errors name its arguments."""
    path = resolve(str(model))
    plan = _plan(path / "plan.json", data)
    text = Setting("test.source", data)
    if plan is not None and data is not None and is_tuned_on(plan.recipe, data):
        raise PaleyError(
            text, f": {model} was tuned on this text, and a score on it would flatter",
            remedy=("leave ", Setting("test.source"), " out for the text that its plan set apart, or give another one"),
        )  # fmt: skip
    recipe = plan.recipe if plan is not None else Recipe()
    given = {"source": data, "sequences": sequences, "seq_len": seq_len}
    changes = {name: value for name, value in given.items() if value is not None}
    test, config = (recipe.test or Test()).model_copy(update=changes), read_config(path)
    limit = context_of(config)
    if seq_len is None and limit is not None and test.seq_len > limit:
        monitor.note(f"sequences of {limit} tokens, as this model reads no more")
        test = test.model_copy(update={"seq_len": limit})
    check_seq_len(config, {"test.seq_len": test.seq_len})
    source = test.source or recipe.calibration.source
    named = data is not None or plan is None or source in ("pydoc", SELF)
    if not named and source.startswith("hub:"):  # nothing is fetched because a folder says so
        raise PaleyError(
            f"{path}/plan.json: sets the text {source} apart for scores, which is fetched only if you name it",
            remedy=("use ", Setting("test.source", source)),
        )
    if not named and not Path(source).exists():
        raise PaleyError(
            f"{path}/plan.json: the text {source} that it sets apart for scores is not here",
            remedy=("give its path with ", Setting("test.source")),
        )
    blocks = test_blocks(recipe.model_copy(update={"test": test}), load_tokenizer(path))
    check_vocabulary(blocks.ids, config.vocab_size, blocks.source)
    return blocks
