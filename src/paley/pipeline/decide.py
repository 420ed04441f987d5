"""Decides a problem: grids under a budget, and clip ratios by a search. Nothing of it is executed here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paley.core.schemes import LinearScheme, Schemes
from paley.data import TokenBlocks
from paley.methods.gbs import Outcome
from paley.model.activation_errors import MeasuredErrors, measure_errors
from paley.model.adapter import Adapter, Block
from paley.model.budget import activation_options, check_budget, decide_grids, fed_back, range_note
from paley.model.problem import Problem
from paley.model.replay import runner_of
from paley.model.search import ClipSearch, quicken_
from paley.model.slope_gains import slope_gains
from paley.pipeline.execute import opened_by_block, prepare_, quantize_steps
from paley.pipeline.monitor import Monitor
from paley.pipeline.pool import Pool
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.sensitivities import measure_for, some_blocks
from paley.pipeline.texts import Texts
from paley.plan import Trial
from paley.sensitivity import Sensitivity

__all__ = ["Decision", "as_quantized", "decide", "decide_under_budget", "measure_errors_for"]


@dataclass(frozen=True)
class Decision:
    """What was decided for each site, the loss that is predicted or was found, and the search's trials."""

    schemes: Schemes
    predicted_loss: float | None = None
    trace: tuple[Trial, ...] = ()


def decide(
    problem: Problem,
    texts: Texts,
    run: RunDirectory | None,
    monitor: Monitor,
    device: str,
    sensitivity: Sensitivity | None = None,
    pool: Pool | None = None,
) -> Decision:
    """The problem's schemes, with grids allocated and clip ratios searched if it asks for that.

    sensitivity: what grids are allocated by; measured now unless given, by the pool. The search sees weights quantized
    under the recipe's own clip ratios; executing the plan calibrates them anew under the found ones.
    """
    for note in problem.notes:
        monitor.note(note)
    decision = Decision(problem.schemes)
    if problem.budget is not None:
        sensitivity = sensitivity or measure_for(problem, run, monitor, device, pool)
        errors = measure_errors_for(problem, sensitivity, monitor, device)
        sensitivity = as_quantized(problem, sensitivity, texts.calibration, monitor, device)
        decision = decide_under_budget(problem, sensitivity, errors, monitor)
    if problem.search.method == "none":
        return decision
    assert texts.search is not None
    return _search(problem.with_schemes(decision.schemes), texts.search, texts, run, monitor, device)


def decide_under_budget(
    problem: Problem, sensitivity: Sensitivity, errors: MeasuredErrors | None, monitor: Monitor
) -> Decision:
    """The schemes of least predicted loss within the problem's budget."""
    sensitivity.check_fingerprint(problem.source.fingerprint)
    if problem.rotation is None:
        monitor.note("budget: the prediction counts on Gaussian weights, but nothing is rotated to make them so")
    schemes, allocation = decide_grids(problem, sensitivity, errors)
    if text := range_note(problem.with_schemes(schemes)):
        monitor.note(text)
    return Decision(schemes, allocation.loss)


def measure_errors_for(
    problem: Problem, sensitivity: Sensitivity, monitor: Monitor, device: str
) -> MeasuredErrors | None:
    """What rounding loses of the keys, values and inputs whose grids the budget decides; None without any."""
    check_budget(problem, sensitivity)
    if not (options := activation_options(problem)):
        return None
    monitor.stage("measuring what rounding loses of keys, values and inputs", 1)
    blocks = some_blocks(problem, sensitivity, monitor, device)
    adapter = Adapter(problem.source.load(device=device))
    prepare_(problem, adapter)
    found = measure_errors(adapter, blocks.ids.to(device), problem.schemes, options)
    monitor.step()
    return found


def as_quantized(
    problem: Problem, sensitivity: Sensitivity, calibration: TokenBlocks | None, monitor: Monitor, device: str
) -> Sensitivity:
    """The slopes as they are behind the problem's diagonals and GPTQ's feedback; they were measured without.

    calibration: what GPTQ sees; for diagonals alone a few sequences of the slopes' own text do.
    """
    linears, feedback = problem.schemes.linears, fed_back(problem)
    if not feedback and not any(scheme.diagonal for scheme in linears.values()):
        return sensitivity
    monitor.stage("measuring what diagonals and feedback gain", problem.sites.blocks)
    blocks = calibration if feedback else some_blocks(problem, sensitivity, monitor, device)
    assert blocks is not None  # who wants feedback calibrates
    paged = device == "cpu" and problem.source.has_pages
    adapter, bring, drop = opened_by_block(problem, device, paged=paged)

    def begin(block: Block) -> None:
        bring(block)
        block.module.float()

    def end(block: Block) -> None:
        drop(block)
        monitor.step()

    ids = blocks.ids.to(adapter.device)
    gains = slope_gains(runner_of(adapter), ids, linears, feedback, begin=begin, end=end)
    slots = {name: slot.scaled(gains.get(name, 1.0)) for name, slot in sensitivity.slots.items()}
    return sensitivity.model_copy(update={"slots": slots})


def _search(
    problem: Problem, blocks: TokenBlocks, texts: Texts, run: RunDirectory | None, monitor: Monitor, device: str
) -> Decision:
    """Clip ratios found on a draft: the model with its blocks quantized, embedding and head as they are."""
    draft = problem.with_schemes(_blocks_alone(problem))
    adapter = Adapter(problem.source.load(device=device))
    ids = blocks.ids.to(device)
    runner = runner_of(adapter)
    prepare_(draft, adapter)
    reference = runner.suffix(0, runner.embed(ids))
    quantize_steps(runner, draft, texts.calibration, run, "draft", monitor)
    quicken_(adapter)
    search = ClipSearch(runner, ids, reference, draft.schemes, problem.search)
    monitor.stage("searching clip ratios", len(search.knobs))
    trace = list(run.trials()) if run else []
    loss: float | None = None

    def on_trial(trial: Trial) -> None:
        trace.append(trial)
        if run:
            run.add_trial(trial)

    def on_knob(name: str, outcome: Outcome) -> None:
        nonlocal loss
        loss = outcome.loss
        monitor.step(f"{name}  clip {outcome.clip_ratio:.3f}  {problem.search.objective} {outcome.loss:.4f}")

    search.run(trace.copy(), on_trial, on_knob)
    return Decision(
        Schemes({**problem.schemes.linears, **_inputs(problem, search.linears)}, search.attentions), loss, tuple(trace)
    )


def _blocks_alone(problem: Problem) -> Schemes:
    outer = {site.name for site in problem.sites.of("embedding", "head")}
    linears = {name: LinearScheme() if name in outer else s for name, s in problem.schemes.linears.items()}
    return Schemes(linears, problem.schemes.attentions)


def _inputs(problem: Problem, found: dict[str, LinearScheme]) -> dict[str, LinearScheme]:
    """The problem's schemes with the found rounding of inputs."""
    return {name: replace(s, input=found[name].input) for name, s in problem.schemes.linears.items()}
