"""Executes a decided problem: rotates the model and quantizes it step by step; what is finished is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.arch import Site
from paley.core.rounding import Quantized
from paley.data import TokenBlocks
from paley.format import spec
from paley.format.checkpoint import read_tensors
from paley.format.dtypes import cast_to_store
from paley.format.writer import write_tensors
from paley.model.adapter import Adapter, Block
from paley.model.calibrate import LayerReport, ModelQuantizer, wrap_block_, wrap_outer_
from paley.model.capture import BlockRunner
from paley.model.key_statistics import KeySettler
from paley.model.problem import Problem
from paley.model.replay import runner_of
from paley.model.rotation import fold_, rotate_inputs_
from paley.pipeline.machine import give_back
from paley.pipeline.monitor import Monitor
from paley.pipeline.reuse import Kept
from paley.pipeline.run_directory import RunDirectory

__all__ = ["execute", "prepare_", "quantize_steps"]


def execute(
    problem: Problem, calibration: TokenBlocks | None, run: RunDirectory | None, monitor: Monitor, device: str,
    kept: Kept | None = None,
) -> tuple[PreTrainedModel, list[LayerReport]]:  # fmt: skip
    """-> the quantized model, ready to run or to save, and a report for each quantized weight.

    kept: weights that are taken from another folder.
    """
    adapter = Adapter(problem.source.load(dtype=_held(problem), device=device))
    fold_(adapter, problem.rotation)
    _prepare_outer_(problem, adapter)
    runner = runner_of(adapter)
    begin = partial(_prepare_block_, problem, adapter)
    reports = quantize_steps(runner, problem, calibration, run, "final", monitor, begin, kept)
    return adapter.model.float(), reports


def _held(problem: Problem) -> torch.dtype:
    """The type in which blocks wait for their turn: that of the files, unless something is folded before."""
    return (
        torch.float32 if problem.folded or problem.sites.architecture.walked else problem.source.checkpoint.float_dtype
    )


def prepare_(problem: Problem, adapter: Adapter) -> None:
    """Rotates the model, rounds what stays unquantized to its storage type, and wraps the linears."""
    fold_(adapter, problem.rotation)
    _prepare_outer_(problem, adapter)
    for block in adapter.blocks:
        _prepare_block_(problem, adapter, block)


def _prepare_outer_(problem: Problem, adapter: Adapter) -> None:
    """What is not in a block: embedding, final norm, head."""
    head = adapter.sites.head
    if head.stored_as == head.name and head.name in problem.inputs():
        adapter.head.float()  # 16 bits would round what is turned
    rotate_inputs_(adapter, [head], problem.inputs())
    blocks = f"{adapter.architecture.blocks}."
    _cast_(problem, ((n, p) for n, p in adapter.model.named_parameters() if not n.startswith(blocks)))
    wrap_outer_(adapter, problem.schemes)


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


def quantize_steps(
    runner: BlockRunner,
    problem: Problem,
    calibration: TokenBlocks | None,
    run: RunDirectory | None,
    stage: str,
    monitor: Monitor,
    begin: Callable[[Block], None] = lambda _: None,
    kept: Kept | None = None,
) -> list[LayerReport]:
    """The embedding, every block, the head; a step that the run directory holds already is taken from there.

    begin: as of `ModelQuantizer`. kept: as of `execute`.
    """
    adapter = runner.adapter
    ids = calibration.ids.to(adapter.model.device) if calibration is not None else None
    keys = None
    if not problem.sites.architecture.walked:  # whose keys are not centred
        keys = KeySettler(runner, ids, problem.schemes.attentions, partial(_cast_block_, problem))
    if not any(scheme.needs_data for scheme in problem.schemes.linears.values()):
        ids = None  # for keys alone
    quantizer = ModelQuantizer(runner, ids, problem.schemes, compensate=problem.compensate, keys=keys, begin=begin)
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

    def step(
        name: str, sites: list[Site], make: Callable[[dict[str, Quantized], dict[str, Tensor]], list[LayerReport]],
        beside: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:  # fmt: skip
        """One step, from its file if that is there; beside: what is stored with its codes."""
        file = file_of(name)
        if file is not None and file.exists():
            known, held = _read(file, problem)
        else:
            known, held = ({}, {}) if kept is None else (kept.codes(sites, problem), kept.diagonals(sites))
        done = make(known, held)
        if file is not None and not file.exists() and (done or beside()):
            _write(file, done, beside())
        reports.extend(replace(report, quantized=None) for report in done)
        done.clear()
        give_back()

    places = problem.sites
    steps = {"embedding": [places.embedding]}
    steps |= {f"block-{index:04d}": places.of("linear", block=index) for index in range(len(adapter.blocks))}
    steps |= {"head": [places.head] if places.head.stored_as == places.head.name else []}
    last = max((at for at, (name, sites) in enumerate(steps.items()) if is_open(name, sites)), default=-1)
    step("embedding", steps["embedding"], lambda known, _: quantizer.embedding(known, show))
    for index in range(len(adapter.blocks)):
        if index >= last:  # the embedding is step 0
            quantizer.read_no_more()
        step(
            name := f"block-{index:04d}", steps[name],
            lambda known, held, index=index: quantizer.block(index, known, held, show),
            lambda index=index: quantizer.beside(index),
        )  # fmt: skip
    step("head", steps["head"], lambda known, _: quantizer.head(known, show))
    for name, experts in quantizer.unreached.items():
        monitor.note(f"{name}: the text reached no {_numbers(experts)} of its experts, which are rounded to nearest")
    return reports


def _numbers(experts: list[int], shown: int = 8) -> str:
    more = f" and {len(experts) - shown} more" if len(experts) > shown else ""
    return f"{', '.join(map(str, experts[:shown]))}{more}"


def _write(file: Path, reports: list[LayerReport], beside: dict[str, Tensor]) -> None:
    tensors = dict(beside)
    for report in reports:
        assert report.quantized is not None
        tensors |= spec.encode_linear(report.name, report.quantized)
    write_tensors(file, tensors)


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
