"""Executes a decided problem: rotates the model and quantizes it step by step; what is finished is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.arch import Site
from paley.core.memory import give_back
from paley.core.rounding import Quantized
from paley.data import TokenBlocks
from paley.format import spec
from paley.format.checkpoint import read_tensors
from paley.format.dtypes import cast_to_store
from paley.format.header import read_metadata
from paley.format.writer import write_tensors
from paley.kernels.floats import quickly
from paley.model.adapter import Adapter, Block
from paley.model.calibrate import LayerReport, ModelQuantizer
from paley.model.capture import BlockRunner
from paley.model.fold import fold_part_
from paley.model.key_statistics import KeySettler
from paley.model.problem import Problem
from paley.model.replay import runner_of
from paley.model.rotation import fold_, rotate_inputs_
from paley.model.wrapping import attach_, wrap_block_, wrap_head_
from paley.pipeline.monitor import Monitor
from paley.pipeline.reuse import Kept
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.saving import sample_ids, sampled_logits, stored_tensors
from paley.pipeline.states import States

__all__ = ["Executed", "execute", "prepare_", "quantize_steps"]


@dataclass(frozen=True)
class Executed:
    """A quantized model, the blocks of which are in memory if `whole`; else they lie in the run directory.

    reports: one for each quantized weight. logits: `sample_logits` of the model.
    """

    model: PreTrainedModel
    whole: bool
    reports: list[LayerReport]
    logits: Tensor


def execute(
    problem: Problem, calibration: TokenBlocks | None, run: RunDirectory | None, monitor: Monitor, device: str,
    kept: Kept | None = None, *, whole: bool = False,
) -> Executed:  # fmt: skip
    """Quantizes the model; with a run directory, where each block goes when it is done, it never is in memory whole.

    kept: weights that are taken from another folder. whole: keep the blocks in memory all the same.
    """
    source = problem.source
    paged = run is not None and device == "cpu" and source.has_pages and not whole
    adapter, bring, end = opened_by_block(problem, device, paged=paged)
    _prepare_outer_(problem, adapter)

    def begin(block: Block | None) -> None:
        if block is None:
            _prepare_head_(problem, adapter)
            return
        bring(block)
        _prepare_block_(problem, adapter, block)

    states = States(run.path / "states") if run is not None and device == "cpu" and not whole else None
    reports, logits = quantize_steps(
        runner_of(adapter), problem, calibration, run, "final", monitor, begin, end, states, kept
    )
    return Executed(adapter.model, not paged, reports, logits)


def opened_by_block(
    problem: Problem, device: str, *, paged: bool
) -> tuple[Adapter, Callable[[Block], None], Callable[[Block], None]]:
    """The unquantized model, what to call when the turn of a block begins, and what when it is over.

    A block is folded when its turn begins. paged: it is read then, too, and let go of afterwards.
    """
    adapter = Adapter(problem.source.load(dtype=problem.waiting_dtype, device=device, blocks=not paged))
    pages = problem.source.pages(adapter) if paged else None
    fold_part_(adapter, problem.rotation, None)

    def begin(block: Block) -> None:
        if pages is not None:
            pages.bring_(block.index)
        fold_part_(adapter, problem.rotation, block.index)

    def end(block: Block) -> None:
        if pages is not None:
            pages.drop_(block.index)

    return adapter, begin, end


def prepare_(problem: Problem, adapter: Adapter) -> None:
    """Rotates the model, rounds what stays unquantized to its storage type, and wraps the linears."""
    fold_(adapter, problem.rotation)
    _prepare_outer_(problem, adapter)
    for block in adapter.blocks:
        _prepare_block_(problem, adapter, block)
    _prepare_head_(problem, adapter)


def _prepare_outer_(problem: Problem, adapter: Adapter) -> None:
    """What is in no block: embedding and final norm."""
    blocks = f"{adapter.architecture.blocks}."
    later = blocks if adapter.sites.tied else (blocks, f"{adapter.sites.head.module}.")
    _cast_(problem, ((n, p) for n, p in adapter.model.named_parameters() if not n.startswith(later)))
    attach_(adapter, problem.schemes)


def _prepare_head_(problem: Problem, adapter: Adapter) -> None:
    head = adapter.sites.head
    if adapter.sites.tied:
        return
    scheme = problem.schemes.linears[head.name]
    by_rows = scheme.weight is not None and not scheme.calibrated  # `ModelQuantizer.head` turns it then
    if not by_rows:
        if head.name in problem.inputs():
            adapter.head.float()  # 16 bits would round what is turned
        rotate_inputs_(adapter, [head], problem.inputs())
    _cast_(problem, ((f"{head.module}.{n}", p) for n, p in adapter.head.named_parameters()))
    if not by_rows:
        wrap_head_(adapter, problem.schemes)


def _prepare_block_(problem: Problem, adapter: Adapter, block: Block) -> None:
    block.module.float()
    rotate_inputs_(adapter, block.linears(), problem.inputs())
    _cast_block_(problem, block)
    wrap_block_(adapter, block, problem.schemes)


def _cast_block_(problem: Problem, block: Block) -> None:
    _cast_(problem, ((f"{block.name}.{n}", p) for n, p in block.module.named_parameters()))


def _cast_(problem: Problem, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Rounds what stays unquantized to the type that it is stored in."""
    held = (problem.sites.held_as(site) for site, scheme in problem.weights() if scheme.weight is not None)
    quantized = {name for names in held for name in names}
    for name, parameter in parameters:
        if name not in quantized:
            parameter.data = cast_to_store(name, parameter.data, problem.dtype).to(parameter.dtype)


@quickly
def quantize_steps(
    runner: BlockRunner,
    problem: Problem,
    calibration: TokenBlocks | None,
    run: RunDirectory | None,
    stage: str,
    monitor: Monitor,
    begin: Callable[[Block | None], None] = lambda _: None,
    end: Callable[[Block], None] = lambda _: None,
    states: States | None = None,
    kept: Kept | None = None,
) -> tuple[list[LayerReport], Tensor]:
    """The embedding, every block, the head -> a report for each weight, and the model's `sample_logits`.

    A step that the run directory holds already is taken from there; a block that `states` are behind stays as it is.
    begin: as of `ModelQuantizer`; end: called with a block that is done with. kept: as of
    `execute`.
    """
    adapter = runner.adapter
    ids = calibration.ids.to(adapter.device) if calibration is not None else None
    keys = None
    if not problem.sites.architecture.walked:  # whose keys are not centred
        keys = KeySettler(runner, ids, problem.schemes.attentions, partial(_cast_block_, problem))
    if ids is not None:  # what `keys` reads is its own
        ids = ids[:read] if (read := problem.sequences_read(*ids.shape)) else None
    where = {} if states is None else {"place": states.place, "release": states.release}
    quantizer = ModelQuantizer(
        runner, ids, problem.schemes, compensate=problem.compensate, share=problem.share, keys=keys, begin=begin,
        **where,
    )  # fmt: skip
    count = sum(scheme.weight is not None for _, scheme in problem.weights())
    monitor.stage("quantizing weights" if stage == "final" else "quantizing weights for the search", count)
    reports: list[LayerReport] = []

    def show(report: LayerReport) -> None:
        monitor.step(f"{report.name}  rel_error {report.rel_error:.4f}")

    def file_of(name: str) -> Path | None:
        return run.stage_file(stage, name) if run else None

    def is_open(name: str, sites: list[Site]) -> bool:
        """Whether a step has codes to be made yet."""
        file, has = file_of(name), frozenset() if kept is None else kept.names
        made = file is not None and file.exists()
        return not made and any(problem.schemes.linears[site.name].weight and site.name not in has for site in sites)

    def recall(file: Path) -> list[LayerReport]:
        """The reports of a step that is done; what no token reached there is noted once more."""
        told = _reported(file)
        quantizer.unreached |= {report.name: unreached for report, unreached in told if unreached}
        return [report for report, _ in told]

    def step(
        name: str, sites: list[Site], make: Callable[[dict[str, Quantized], dict[str, Tensor]], list[LayerReport]],
        others: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:  # fmt: skip
        """One step, from its file if that is there; others: what the file holds beside codes."""
        file = file_of(name)
        if file is not None and file.exists():
            known, held = _read(file, problem)
            recall(file)
        else:
            known, held = ({}, {}) if kept is None else (kept.codes(sites, problem), kept.diagonals(sites))
        done = make(known, held)
        if file is not None and not file.exists() and (done or others()):
            _write(file, done, others(), {r.name: quantizer.unreached.get(r.name, []) for r in done})
        reports.extend(replace(report, quantized=None) for report in done)
        done.clear()
        give_back()

    places = problem.sites
    steps = {"embedding": [places.embedding]}
    steps |= {_block_name(block.index): places.of("linear", block=block.index) for block in adapter.blocks}
    steps |= {"head": [places.head] if places.head.stored_as == places.head.name else []}
    last = max((at for at, (name, sites) in enumerate(steps.items()) if is_open(name, sites)), default=-1)
    step("embedding", steps["embedding"], lambda known, _: quantizer.embedding(known, show))
    sample = runner.embed(sample_ids(adapter))
    start = 0
    if states is not None and run is not None:
        found = states.last(quantizer.states() | {"sample": sample}, quantizer.placed())
        files = [] if found is None else [run.stage_file(stage, _block_name(index)) for index in range(found[0])]
        needed = quantizer.placed().keys() if last > len(files) else set()  # by a step behind them that is open
        if found is not None and needed <= found[1].keys() and all(file.exists() for file in files):
            for report in chain.from_iterable(map(recall, files)):
                reports.append(report)
                show(report)
            start, sample = len(files), found[1]["sample"]
            quantizer.go_on(found[1])
            states.drop()  # those of the embedding
        else:
            states.commit(0, quantizer.states() | {"sample": sample})
    for block in adapter.blocks[start:]:
        if block.index >= last:  # the embedding is step 0
            quantizer.read_no_more()
        step(
            name := _block_name(block.index), steps[name],
            lambda known, held, block=block: quantizer.block(block.index, known, held, show),
            lambda block=block: stored_tensors(block.module, f"{block.name}.", problem) | quantizer.beside(block.index),
        )  # fmt: skip
        sample = runner.block(block.index, sample)
        end(block)
        if states is not None:
            states.commit(block.index + 1, quantizer.states() | {"sample": sample})
    step("head", steps["head"], lambda known, _: quantizer.head(known, show))
    for name, experts in quantizer.unreached.items():
        monitor.note(f"{name}: the text reached no {_numbers(experts)} of its experts, which are rounded to nearest")
    adapter.model.float()
    return reports, sampled_logits(runner, sample)


def _block_name(index: int) -> str:
    return f"block-{index:04d}"


def _numbers(experts: list[int], shown: int = 8) -> str:
    more = f" and {len(experts) - shown} more" if len(experts) > shown else ""
    return f"{', '.join(map(str, experts[:shown]))}{more}"


def _write(file: Path, reports: list[LayerReport], others: dict[str, Tensor], unreached: dict[str, list[int]]) -> None:
    tensors = dict(others)
    for report in reports:
        assert report.quantized is not None
        tensors |= spec.encode_linear(report.name, report.quantized)
    told = [(report.name, report.rel_error, report.experts, unreached[report.name]) for report in reports]
    write_tensors(file, tensors, {"reports": json.dumps(told)})


def _reported(file: Path) -> list[tuple[LayerReport, list[int]]]:
    """What was told of the weights of a step -> (report, experts that no token reached) of each."""
    told = json.loads(read_metadata(file)["reports"])
    return [(LayerReport(name, error, None, tuple(experts)), unreached) for name, error, experts, unreached in told]


def _read(file: Path, problem: Problem) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """-> the codes of a step by the name of the weight, and what is stored beside them by the name of the tensor."""
    tensors = read_tensors(file)
    known = {
        site.name: spec.decode_linear(site.name, tensors, scheme, scheme.stored_width(problem.shape(site)[1]))
        for site, scheme in problem.weights()
        if site.name + spec.CODES in tensors
    }
    parts = {name + part for name in known for part in spec.PARTS}
    return known, {name: tensor for name, tensor in tensors.items() if name not in parts}
