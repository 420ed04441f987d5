"""Quantizes a checkpoint tensor by tensor, without data and without ever holding the model.

What needs no text and no folding needs no model either: the unit of work is one weight, read from its shard, rounded
a few rows at a time, and written to a file of its own. Units share nothing, so that any number of processes can take
them, and a killed run loses those at work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paley.arch import Site
from paley.core.errors import PaleyError
from paley.core.rounding import stacked
from paley.core.schemes import LinearScheme
from paley.core.transforms import Transform
from paley.format import spec
from paley.format.checkpoint import Checkpoint, read_tensors
from paley.format.dtypes import cast_to_store
from paley.format.header import TensorInfo, parts_of, read_metadata
from paley.format.writer import ShardWriter, write_tensors
from paley.methods.nearest import Error, turned_parts
from paley.model.calibrate import LayerReport
from paley.model.loading import is_ignored
from paley.model.problem import Problem
from paley.pipeline.monitor import Monitor
from paley.pipeline.pool import Here, Pool
from paley.pipeline.reuse import Kept
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.saving import finish_checkpoint

__all__ = ["TensorJob", "quantize_tensor", "stream_checkpoint"]

_CHUNK = 2**20  # values turned together
_SHARD = 2**28  # bytes; a shard is in memory while it fills


@dataclass(frozen=True)
class TensorJob:
    """One weight: where it is read, what is done to it, and the file that its codes go to; of a stack all experts.

    rows: of its codes.
    """

    name: str
    rows: int
    weight: TensorInfo
    scheme: LinearScheme
    file: Path
    experts: int = 0
    transposed: bool = False


def quantize_tensor(job: TensorJob) -> LayerReport:
    """Reads, rotates, rounds and writes one weight; the file appears whole or not at all."""
    scheme, transform = job.scheme.weight, job.scheme.transform
    assert scheme is not None
    total, experts = Error(), list[float]()

    def parts() -> Iterator[dict[str, Tensor]]:
        for weight in _matrices(job):
            own = Error()
            for part, error in turned_parts(weight, scheme, transform, job.name):
                own.add(error)
                yield spec.encode_linear(job.name, part)  # packed at once: codes are several times larger
            total.add(own)
            experts.append(own.relative)

    tensors = stacked(parts(), job.rows)
    own = tuple(experts) if job.experts else ()
    write_tensors(job.file, tensors, {"rel_error": repr(total.relative), "experts": json.dumps(own)})
    return LayerReport(job.name, total.relative, None, own)


def _matrices(job: TensorJob) -> Iterator[Tensor]:
    """The matrix [out, in], or that of one expert after the other."""
    for part in parts_of(job.weight) if job.experts else [job.weight.read()]:
        yield part.mT if job.transposed else part


def stream_checkpoint(
    problem: Problem, run: RunDirectory, monitor: Monitor, pool: Pool | None = None, kept: Kept | None = None
) -> list[LayerReport]:
    """Quantizes every weight of the problem, writes the run's checkpoint folder -> a report for each weight.

    kept: weights that are taken from another folder.
    """
    source = problem.source
    jobs = [
        TensorJob(
            site.name,
            site.shape[0],
            source.checkpoint.info(site.tensor),
            scheme,
            run.stage_file("final", site.name),
            site.experts,
            site.transposed,
        )
        for site, scheme in problem.weights()
        if scheme.weight is not None
    ]
    if kept is not None:
        _take_over(kept, jobs)
    monitor.stage("quantizing weights", len(jobs))
    reports = {}
    for report in _run(jobs, pool or Here()):
        reports[report.name] = report
        monitor.step(f"{report.name}  rel_error {report.rel_error:.4f}")
    files = {job.name: job.file for job in jobs}
    monitor.stage("writing the checkpoint", len(source.checkpoint))
    with ShardWriter(run.fresh_checkpoint(), max_shard_bytes=_SHARD) as writer:
        for name, tensor in _tensors(problem, files):
            writer.add(name, tensor, own=True)
            if not name.endswith(spec.PARTS[1:]):  # a weight's codes come first, and count for all of it
                monitor.step(name)
    finish_checkpoint(run.checkpoint, source.skeleton, problem)
    _check_stored(run.checkpoint, problem, files)
    return [reports[job.name] for job in jobs]


def _run(jobs: list[TensorJob], pool: Pool) -> Iterator[LayerReport]:
    """Reports as they come; a weight whose file is there already is not made again."""
    waiting = []
    for job in jobs:
        if job.file.exists():
            yield _finished(job)
        else:
            waiting.append(job)
    yield from pool.run(quantize_tensor, waiting)
    pool.release()


def _take_over(kept: Kept, jobs: list[TensorJob]) -> None:
    """Makes the files of kept weights, as if a run that was stopped had left them."""
    for job in jobs:
        if job.name in kept.names and not job.file.exists():
            layer = kept.base.results.layers[job.name]
            told = {"rel_error": repr(layer.rel_error), "experts": json.dumps(layer.experts or ())}
            write_tensors(job.file, kept.tensors(job.name), told)


def _finished(job: TensorJob) -> LayerReport:
    told = read_metadata(job.file)
    return LayerReport(job.name, float(told["rel_error"]), None, tuple(json.loads(told["experts"])))


def _tensors(problem: Problem, files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the new checkpoint, one in memory at a time: codes from their files, the rest as it was."""
    source, linears = problem.source, problem.schemes.linears
    held, wanted = {site.tensor: site for site in source.sites.weights}, source.skeleton.state_dict().keys()
    for name in source.checkpoint.names:
        site = held.get(name)
        if site is not None and site.name in files:
            yield from read_tensors(files[site.name]).items()
        elif name in wanted or not is_ignored(name, source.skeleton):
            tensor = source.checkpoint.tensor(name)
            if site is not None and linears[site.name] != LinearScheme():
                name, tensor = site.name + spec.WEIGHT, _as_rows(tensor, site)
                tensor = _rotated(tensor, linears[site.name].transform)
            yield name, cast_to_store(name, tensor, problem.dtype)
    for name, info in problem.carried.items():
        yield name, info.read()


def _as_rows(tensor: Tensor, site: Site) -> Tensor:
    """What the original holds of a weight -> [rows, columns]."""
    return (tensor.mT if site.transposed else tensor).reshape(site.shape)


def _rotated(weight: Tensor, transform: Transform | None) -> Tensor:
    """A weight that stays unquantized, in the coordinates that its input is turned to at run time."""
    if transform is None:
        return weight
    rows = weight.split(max(1, _CHUNK // weight.shape[1]))
    return torch.cat([transform.apply(part.double()).float() for part in rows])


def _check_stored(folder: Path, problem: Problem, files: dict[str, Path]) -> None:
    """Reads the folder back; raises unless it holds, of every weight, just what its scheme asks for and was made."""
    stored = Checkpoint.open(folder)
    for site, scheme in problem.weights():
        rows, columns = problem.shape(site)
        expected = spec.expected_tensors(site.name, scheme, scheme.stored_width(columns), rows)
        if scheme == LinearScheme():
            expected = {site.tensor: (None, problem.source.checkpoint.shape(site.tensor))}
        made = read_tensors(files[site.name]) if site.name in files else {}
        for name, (dtype, shape) in expected.items():
            info = stored.info(name)
            good = info.shape == shape and dtype in (None, info.dtype)
            if not good or (name in made and not torch.equal(stored.tensor(name), made[name])):
                raise PaleyError(
                    f"{info.file}: {name} reads back as {info.dtype} {list(info.shape)}, not as it was written; "
                    "nothing was published; please report this"
                )
