"""`paley.quantize`: from a checkpoint and a recipe, or a plan, to a verified and evaluated quantized folder."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from paley.core.errors import PaleyError
from paley.core.files import write_atomic
from paley.core.memory import give_back
from paley.core.schemes import Schemes
from paley.data import TokenBlocks
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.format.checkpoint import Checkpoint
from paley.format.digests import seal
from paley.format.publish import RESULTS
from paley.model.loading import Source, open_source
from paley.model.placing import summed_up
from paley.model.problem import Problem
from paley.model.reading import prepare_
from paley.ops.matmul import EXACT
from paley.pipeline.accounting import parameter_count, quantized_bits, untouched
from paley.pipeline.card import model_card
from paley.pipeline.decide import Decision, decide
from paley.pipeline.estimate import Estimate, check_memory, estimate_run, faster
from paley.pipeline.execute import execute
from paley.pipeline.monitor import Monitor
from paley.pipeline.paged import page_original
from paley.pipeline.pool import Pool, pool_of
from paley.pipeline.resolve import resolve, under_plan
from paley.pipeline.reuse import Base
from paley.pipeline.run_directory import LAYOUT, RunDirectory
from paley.pipeline.saving import Stored, load_stored, sample_logits, save_checkpoint, verify
from paley.pipeline.streaming import stream_checkpoint
from paley.pipeline.texts import Texts, fit_lengths, gather
from paley.pipeline.tune import tune_
from paley.pipeline.worker_memory import of_tensors
from paley.plan import Plan
from paley.recipe import Recipe, as_recipe
from paley.recipe.sources import relative_source
from paley.results import EvalResult, KeptResult, LayerResult, Results
from paley.sensitivity import Sensitivity

__all__ = ["Outcome", "estimate", "make_plan", "quantize"]

EVAL_BATCH = 8


@dataclass(frozen=True)
class Outcome:
    """Where the quantized model is, what was decided, and what was measured (also in results.json)."""

    output: Path
    plan: Plan
    results: Results


def quantize(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    output: str | Path,
    plan: Plan | None = None,
    sensitivity: Sensitivity | None = None,
    base: str | Path | None = None,
    exact: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    monitor: Monitor | None = None,
) -> Outcome:
    """Quantizes the checkpoint folder or Hub name `model` into the new folder `output`.

    recipe: a Recipe, a preset's name such as "w4a4kv4", or a .yaml or .json file; or give a plan that was made for
    this model. sensitivity: what a recipe with a budget goes by; without it, it is measured. workers: processes that
    share the weights of a data-free recipe; others use one. ray: the Ray cluster whose workers do that instead:
    its address, HOST:PORT or auto; "local" starts one here. base: a folder that was made of this model before, whose
    weights are kept wherever their schemes are the same; without a recipe or a plan its recipe is taken. exact: keep
    only such weights as a run without `base` would make the same (`pipeline.reuse`). A run that was stopped goes on
    with resume=True. Errors: PaleyError, with nothing written to `output`. overwrite=True makes everything anew, also
    where the folder there came of the same settings.
    """
    monitor, output = monitor or Monitor(), Path(output)
    earlier = Base.asked_for(base, exact)
    recipe = earlier.plan.recipe if earlier is not None and recipe is None and plan is None else recipe
    wanted = _wanted(recipe, plan, sensitivity)
    run = RunDirectory(output)
    run.check_free(resume=resume, overwrite=overwrite)
    monitor.stage("checking the checkpoint", 1)
    source = open_source(model)
    run.check_apart(source.path)
    wanted = fit_lengths(wanted, source, monitor, measures=_measures(wanted, plan, sensitivity))
    problem = _problem(source, wanted, plan, sensitivity)
    if earlier is not None:
        run.check_apart(earlier.folder)
        decided = plan is not None or (wanted.budget is None and wanted.search.method == "none")
        earlier.check(problem, decided=decided)
    estimated = _estimate(problem, wanted, plan, sensitivity)
    if device == "cpu":
        check_memory(problem, wanted, estimated.memory, decided=plan is not None, measured=sensitivity is not None)
    paged = estimated.paged and device == "cpu"
    monitor.note(str(estimated))
    if hint := faster(problem, wanted, estimated):
        monitor.note(hint)
    monitor.expect(estimated.stages)
    key = _key(problem, plan.to_json() if plan is not None else wanted.hash() + _digest(sensitivity), earlier, exact)
    with run.open(key, resume=resume, overwrite=overwrite):
        if not (resume and run.finished) and not (run.checkpoint / RESULTS).exists():
            with pool_of(workers, ray) as pool:
                alike = workers if ray is None else 1  # nodes may have any of the largest tensors
                each = of_tensors(source.sites, alike) if problem.is_data_free else 0
                pool.check(source.path, output=run.path, memory=each)
                _make(problem, wanted, plan, sensitivity, run, monitor, device, pool, earlier, exact, paged=paged)
        if run.checkpoint.exists():
            run.sweep()
            seal(run.checkpoint)
        for path in run.publish():
            monitor.note(f"{path}: cannot be deleted; delete it yourself")
    return Outcome(output, Plan.load(output / "plan.json"), Results.load(output / RESULTS))


def estimate(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    plan: Plan | None = None,
    sensitivity: Sensitivity | None = None,
) -> Estimate:
    """What `quantize` with the same arguments would take on this machine's CPU; nothing is made.

    Errors: as there, for what can be known before texts are read.
    """
    wanted = _wanted(recipe, plan, sensitivity)
    source = open_source(model)
    wanted = fit_lengths(wanted, source, Monitor(), measures=_measures(wanted, plan, sensitivity))
    return _estimate(_problem(source, wanted, plan, sensitivity), wanted, plan, sensitivity)


def make_plan(
    model: str | Path,
    recipe: Recipe | str | Path,
    *,
    sensitivity: Sensitivity | None = None,
    device: str = "cpu",
    monitor: Monitor | None = None,
) -> Plan:
    """Decides only: the plan that `quantize` with this recipe (as there) would execute."""
    recipe = _as_measured(as_recipe(recipe), sensitivity)
    source = open_source(model)
    monitor = monitor or Monitor()
    recipe = fit_lengths(recipe, source, monitor, measures=_measures(recipe, None, sensitivity))
    problem = resolve(source, recipe)
    texts = gather(recipe, source, device, monitor)
    return _as_plan(problem, recipe, decide(problem, texts, None, monitor, device, sensitivity))


def _wanted(recipe: Recipe | str | Path | None, plan: Plan | None, sensitivity: Sensitivity | None) -> Recipe:
    if (recipe is None) == (plan is None):
        raise PaleyError("quantize: give either a recipe or a plan")
    wanted = plan.recipe if plan is not None else recipe
    assert wanted is not None
    return _as_measured(as_recipe(wanted), sensitivity)


def _problem(source: Source, wanted: Recipe, plan: Plan | None, sensitivity: Sensitivity | None) -> Problem:
    problem = resolve(source, wanted) if plan is None else under_plan(source, plan)
    if sensitivity is not None:
        sensitivity.check_fingerprint(source.fingerprint)
    return problem


def _estimate(problem: Problem, wanted: Recipe, plan: Plan | None, sensitivity: Sensitivity | None) -> Estimate:
    return estimate_run(problem, wanted, decided=plan is not None, measured=sensitivity is not None)


def _as_plan(problem: Problem, recipe: Recipe, decision: Decision) -> Plan:
    source = problem.source
    return Plan(
        fingerprint=source.fingerprint, model_type=source.config.model_type, recipe=recipe, rotation=problem.rotation,
        linears=decision.schemes.linears, attentions=decision.schemes.attentions,
        predicted_loss=decision.predicted_loss, trace=decision.trace,
    )  # fmt: skip


def _as_measured(recipe: Recipe, sensitivity: Sensitivity | None) -> Recipe:
    """The recipe with the text and metric that its slopes really have: no score is reported on that text."""
    if recipe.budget is None or sensitivity is None:
        return recipe
    measured = {"source": sensitivity.text.source, "metric": sensitivity.metric}
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update=measured)})


def _measures(recipe: Recipe, plan: Plan | None, sensitivity: Sensitivity | None) -> bool:
    """Whether a budget's slopes are still to be measured."""
    return recipe.budget is not None and plan is None and sensitivity is None


def _make(
    problem: Problem,
    recipe: Recipe,
    plan: Plan | None,
    sensitivity: Sensitivity | None,
    run: RunDirectory,
    monitor: Monitor,
    device: str,
    pool: Pool,
    base: Base | None,
    exact: bool,
    *,
    paged: bool,
) -> None:
    source = problem.source
    texts = gather(recipe, source, device, monitor, run)
    run.check_texts(texts.hashes)
    original = _original(source, texts.test, run, monitor, device, paged=paged) if texts.test is not None else None
    plan = plan or _plan(problem, recipe, texts, sensitivity, run, monitor, device, pool)
    problem = problem.with_schemes(Schemes(plan.linears, plan.attentions))
    kept = None if base is None else base.kept(problem, texts.hashes, exact=exact, tuned=recipe.tune is not None)
    tuned = frozenset[str]()
    if kept is not None:
        monitor.note(str(kept))
    if problem.is_data_free and recipe.tune is None:
        if device != "cpu":
            monitor.note("weights are quantized on the CPU, one after the other; more workers share them")
        reports = stream_checkpoint(problem, run, monitor, pool, kept)
        stored = load_stored(run.checkpoint, problem, device, paged=paged) if texts.test is not None else None
    else:
        if pool.workers > 1:
            monitor.note("this recipe quantizes blocks one after the other: one process is at work, not more")
        made = execute(problem, texts.calibration, run, monitor, device, kept, whole=recipe.tune is not None)
        reports, blocks, expected = made.reports, run.block_files(), made.logits
        if recipe.tune is not None:
            assert texts.tuning is not None
            tuned = tune_(problem, made.model, texts.tuning, recipe.tune, monitor, device)
            blocks, expected = None, sample_logits(made.model)
        monitor.stage("saving and reading back", 1)
        save_checkpoint(run.fresh_checkpoint(), made.model, problem, blocks)
        whole = made.whole
        del made  # never two copies
        by_block = paged or (texts.test is None and not whole)
        stored = verify(run.checkpoint, problem, expected, device, paged=by_block)
        if texts.test is None:
            stored = None
        elif paged:
            stored = load_stored(run.checkpoint, problem, device, paged=True)
        else:
            prepare_(stored.model, EXACT, torch.float32)
        monitor.step()
    if lost := [r.name for r in reports if not r.rel_error <= 1]:
        monitor.note(
            f"changed by more than all they were: {summed_up(lost)}; results.json has the errors. GPTQ may make up "
            "there for what other layers lose; with compensate=plain it does not"
        )
    measured = None
    give_back()
    if stored is not None and texts.test is not None and original is not None:
        measured = _evaluate(stored, texts.test, Reference.load(original, texts.test), monitor)
    checkpoint = Checkpoint.open(run.checkpoint)
    weights = parameter_count(source, problem.carried)
    bits = checkpoint.nbytes * 8 / weights
    plan = plan.model_copy(update={"bits_per_weight": bits})
    plan.shared(run.output).save(run.checkpoint / "plan.json")
    results = Results(
        run=run.key,
        model_type=source.config.model_type,
        fingerprint=source.fingerprint,
        parameters=weights,
        bits_per_weight=bits,
        bits_per_quantized_weight=quantized_bits(problem),
        bytes=checkpoint.nbytes,
        original_bytes=source.checkpoint.nbytes,
        untouched=untouched(checkpoint, problem),
        evaluation=measured and replace(measured, source=relative_source(measured.source, run.output)),
        layers={r.name: LayerResult(None if r.name in tuned else r.rel_error, r.experts or None) for r in reports},
        texts=texts.hashes,
        kept=None if kept is None else KeptResult(kept.base.digest, len(kept.names), len(kept.fitted)),
        made_with={
            "paley": getattr(sys.modules["paley"], "__version__", "?"), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )  # fmt: skip
    write_atomic(run.checkpoint / "README.md", model_card(results, plan, str(problem.dtype).removeprefix("torch.")))
    results.save(run.checkpoint / RESULTS)


def _evaluate(stored: Stored, test: TokenBlocks, reference: Reference, monitor: Monitor) -> EvalResult:
    monitor.stage("evaluating through the quantized cache", -(-len(test.ids) // EVAL_BATCH))
    return evaluate(
        stored.model, test, reference, batch=EVAL_BATCH, progress=lambda done, total: monitor.step(), turns=stored.turns
    )


def _original(
    source: Source, test: TokenBlocks, run: RunDirectory, monitor: Monitor, device: str, *, paged: bool
) -> Path:
    """The file with the original's scores, which stay out of memory until they are compared with."""
    file = run.path / "reference.safetensors"
    if not file.exists():
        monitor.stage("measuring the original", 1)
        if paged:
            model, turns = page_original(source)
            Reference.of(model, test, turns=turns).save(file)
            del model, turns
        else:
            Reference.of(source.load(device=device), test).save(file)
        give_back(models=True)
        monitor.step()
    return file


def _plan(
    problem: Problem,
    recipe: Recipe,
    texts: Texts,
    sensitivity: Sensitivity | None,
    run: RunDirectory,
    monitor: Monitor,
    device: str,
    pool: Pool,
) -> Plan:
    file = run.path / "plan.json"
    if not file.exists():
        plan = _as_plan(problem, recipe, decide(problem, texts, run, monitor, device, sensitivity, pool))
        if recipe.budget is not None and not plan.trace:
            monitor.note(f"budget: predicted loss {plan.predicted_loss:.4f}")
        plan.save(file)
        return plan
    return Plan.load(file)


def _digest(sensitivity: Sensitivity | None) -> str:
    return "" if sensitivity is None else hashlib.sha256(sensitivity.to_json().encode()).hexdigest()


def _key(problem: Problem, wanted: str, base: Base | None, exact: bool) -> str:
    # The fingerprint says what the model computes, not the type that its config asks for.
    begun = f"{LAYOUT} {problem.source.fingerprint} {problem.dtype} {wanted}"
    earlier = "" if base is None else f" {base.digest} {exact}"
    return hashlib.sha256(f"{begun}{earlier}".encode()).hexdigest()
