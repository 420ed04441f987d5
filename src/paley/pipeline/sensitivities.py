"""`paley.measure_sensitivity`: from a checkpoint and a text to the slope of each of its sites, resumable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from paley.core.errors import PaleyError, Setting, renaming
from paley.data import TokenBlocks, blocks_from_ids, token_blocks
from paley.eval.sampling import sample_documents
from paley.format.journal import open_journal
from paley.methods.sensitivity import (
    AGREEMENT,
    LEVELS,
    Method,
    Slope,
    Trial,
    clamp_slopes,
    measure_slopes,
    method_for,
    noise_levels,
)
from paley.model.adapter import Adapter
from paley.model.curvature import gradient_slopes
from paley.model.fold import fold_norms_
from paley.model.loading import Source, check_seq_len, context_of, open_source
from paley.model.problem import Problem
from paley.model.sensitivity import KINDS, noise_kind, noise_sites
from paley.model.trials import Metric
from paley.pipeline.machine import free_memory
from paley.pipeline.monitor import Monitor
from paley.pipeline.pool import Here, Pool, check_shared, pool_of
from paley.pipeline.probing import NO_NOISE, Found, Probing, trials
from paley.pipeline.run_directory import RunDirectory
from paley.pipeline.texts import SELF, check_vocabulary
from paley.pipeline.worker_memory import of_gradients, of_trials
from paley.sensitivity import MeasuredSlot, MeasuredText, Sensitivity

__all__ = ["RANDOM", "measure_for", "measure_on", "measure_sensitivity", "random_ids", "some_blocks"]

RANDOM = "random"
_PARTS = ("source", "sequences", "seq_len")
# A calibration's settings, as `measure_sensitivity` and as a budget call them.
_ARGUMENTS = {f"calibration.{part}": part for part in _PARTS}
_OF_BUDGET = {f"{where}{part}": f"budget.{part}" for where in ("calibration.", "") for part in (*_PARTS, "method")}
_SEQ_LEN = 512
SOME = 4  # sequences that show what activations look like


def measure_sensitivity(
    model: str | Path | Source,
    *,
    metric: Metric = "kl",
    source: str = SELF,
    sequences: int = 16,
    seq_len: int | None = None,
    kinds: Collection[str] = ("weight",),
    fold: bool = False,
    method: Method | None = None,
    levels: int = LEVELS,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
    ray: str | None = None,
    monitor: Monitor | None = None,
    progress_file: str | Path | None = None,
) -> Sensitivity:
    """Measures a checkpoint folder, a Hub name or an opened source on the calibration part of the text `source`.

    source: `self` (text that the model samples), as in `paley.data.documents`, or `random` (uniform random tokens:
    no data at all, metric kl only). seq_len: None takes 512, or what the model reads if that is less. fold: as recipes
    that rotate have it, with the norms' gains in the weights and noise of one size for rows that they mix.

    method: `gradients` takes one backward pass a sequence for all sites (metric kl only: slopes of small noise);
    `noise` many forward passes for each. None: gradients for kl. Of noise alone: levels; finished trials, which are
    kept in progress_file and taken from it where it exists; workers, processes that share the trials, each with a
    block of the model in memory and one thread; ray, the cluster whose workers do, as of `paley.quantize`.
    """
    monitor = monitor or Monitor()
    check_shared(workers, ray, device)
    method = _method(method, metric)
    if method == "gradients" and (workers > 1 or ray is not None):
        raise PaleyError("sensitivity: workers share trials of noise; add ", Setting("method", "noise"))
    if source == RANDOM and metric != "kl":
        raise PaleyError(f"sensitivity: the {metric} of random tokens means nothing; use metric kl, or a text")
    noise_levels(levels)  # refused before anything is read
    monitor.stage("checking the checkpoint", 1)
    opened = model if isinstance(model, Source) else open_source(model)
    limit = context_of(opened.config) or _SEQ_LEN
    if seq_len is None and limit < _SEQ_LEN:
        monitor.note(f"sequences of {limit} tokens, as this model reads no more")
    seq_len = min(limit, _SEQ_LEN) if seq_len is None else seq_len
    with renaming(_ARGUMENTS):
        check_seq_len(opened.config, {"calibration.seq_len": seq_len})
        blocks = _blocks(opened, source, sequences, seq_len, seed, device)
    monitor.step()
    with pool_of(workers, ray) as pool:
        return measure_on(
            opened, blocks, metric=metric, kinds=kinds, fold=fold, method=method, levels=levels, seed=seed,
            device=device, pool=pool, monitor=monitor, progress_file=progress_file,
        )  # fmt: skip


def measure_on(
    source: Source,
    blocks: TokenBlocks,
    *,
    metric: Metric,
    kinds: Collection[str] = ("weight",),
    fold: bool = False,
    method: Method | None = None,
    levels: int = LEVELS,
    agreement: float | None = AGREEMENT,
    seed: int = 0,
    device: str = "cpu",
    pool: Pool | None = None,
    monitor: Monitor | None = None,
    progress_file: str | Path | None = None,
) -> Sensitivity:
    """As `measure_sensitivity`, on given tokens; agreement: see `measure_slopes`. pool: who makes the trials."""
    monitor = monitor or Monitor()
    if _method(method, metric) == "gradients":
        slopes, baseline = _by_gradients(source, blocks, kinds, fold, seed, device, monitor), 0.0
    else:
        slopes, baseline = _by_noise(
            source, blocks, metric, kinds, fold, levels, agreement, seed, device, pool or Here(), monitor, progress_file
        )
    sites = noise_sites(source.sites, kinds)
    return Sensitivity(
        fingerprint=source.fingerprint,
        model_type=source.config.model_type,
        metric=metric,
        text=MeasuredText(source=blocks.source, sha256=blocks.sha256, tokens=blocks.ids.numel()),
        folded=fold,
        seed=seed,
        baseline=baseline,
        slots={
            name: MeasuredSlot(
                kind=noise_kind(sites[name]), numel=sites[name].numel, alpha=slope.alpha, stderr=slope.stderr,
                clamped=slope.clamped, levels=slope.levels,
            )
            for name, slope in slopes.items()
        },
    )  # fmt: skip


def _method(method: Method | None, metric: Metric) -> Method:
    if method == "gradients" and metric != "kl":
        raise PaleyError(f"sensitivity: gradients tell of kl, not of {metric}; use ", Setting("method", "noise"))
    return method or method_for(metric)


def _by_gradients(
    source: Source, blocks: TokenBlocks, kinds: Collection[str], fold: bool, seed: int, device: str, monitor: Monitor
) -> dict[str, Slope]:
    noise_sites(source.sites, kinds)  # refused before anything is read
    needed, free = of_gradients(source.sites, blocks.ids.shape[1]), free_memory()
    if device == "cpu" and free is not None and needed > free:
        raise PaleyError(
            f"memory: gradients need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            remedy=(
                "take shorter sequences (",
                Setting("seq_len"),
                "), or ",
                Setting("method", "noise"),
                ", which holds a block at a time",
            ),
        )
    monitor.stage("measuring sensitivities", len(blocks.ids))
    adapter = Adapter(source.load(device=device))
    if fold:
        fold_norms_(adapter)
    found = gradient_slopes(
        adapter, blocks.ids.to(device), kinds, rotated=fold, seed=seed, on_sequence=monitor.step
    )  # fmt: skip
    return clamp_slopes(found)


def _by_noise(
    source: Source, blocks: TokenBlocks, metric: Metric, kinds: Collection[str], fold: bool, levels: int,
    agreement: float | None, seed: int, device: str, pool: Pool, monitor: Monitor, progress_file: str | Path | None,
) -> tuple[dict[str, Slope], float]:  # fmt: skip
    """-> slopes, and the loss without noise."""
    settings = {
        "fingerprint": source.fingerprint, "metric": metric, "sha256": blocks.sha256, "folded": fold,
        "levels": levels, "seed": seed, "noise": "rows",
    }  # fmt: skip
    job = Probing(
        str(source.path), source.fingerprint, blocks.ids, metric, tuple(kinds), fold, seed, device,
        key=json.dumps([settings, list(kinds)]),
    )  # fmt: skip
    paged = _checked_memory(job, source, blocks, pool, monitor)
    rounds, baselines = list[int](), list[float]()
    with _journal(progress_file, settings) as (known, keep), trials(job, source, pool, paged=paged) as make:

        def told(slot: str, t: float, draw: int) -> None:
            monitor.step(f"{slot}  t² {t * t:.4f}  {metric} {known[slot, draw]:+.5f}")

        def on_round(wanted: Sequence[Trial]) -> None:
            rounds.append(len(wanted))
            name = "measuring sensitivities" if len(rounds) == 1 else f"measuring close ones, {len(rounds)}"
            monitor.stage(name, len(wanted))
            new = [trial for trial in wanted if (trial[0], trial[2]) not in known]
            for trial in wanted:
                if trial not in new:
                    told(*trial)
            for found in make(new):
                keep(found)
                baselines[:] = [found.baseline]
                told(found.slot, found.t, found.draw)
                if not math.isfinite(found.delta):  # which ends the measurement
                    break

        def delta(slot: str, t: float, draw: int) -> float:
            if (slot, draw) not in known:
                keep(next(iter(make([(slot, t, draw)]))))
            return known[slot, draw]

        sites = noise_sites(source.sites, kinds)
        slopes = measure_slopes(list(sites), delta, levels=levels, agreement=agreement, on_round=on_round)
        if not baselines:  # all trials were known
            baselines = [next(iter(make([NO_NOISE]))).baseline]
    return slopes, baselines[0]


def _checked_memory(job: Probing, source: Source, blocks: TokenBlocks, pool: Pool, monitor: Monitor) -> bool:
    """-> whether this process is to hold a block at a time. Raises if workers, or this process, need too much."""
    own_head, pages = "weight" in job.kinds and job.metric == "kl", job.can_page(source)
    whole, paged = (of_trials(source.sites, blocks, paged=p, own_head=own_head) for p in (False, True))
    pool.check(source.path, memory=paged if pages else whole)
    free = free_memory()
    if not isinstance(pool, Here) or job.device != "cpu" or free is None or whole <= free:
        return False
    if not pages or paged > free:
        raise PaleyError(
            f"memory: sensitivities need about {(paged if pages else whole) / 2**30:.1f} GiB, and {free / 2**30:.1f} "
            "GiB are free",
            remedy=(
                "use fewer or shorter sequences (",
                Setting("sequences"),
                ", ",
                Setting("seq_len"),
                "), or a machine with more memory",
            ),
        )
    monitor.note("memory does not hold the model: it is measured block by block")
    return True


@contextmanager
def _journal(
    file: str | Path | None, settings: dict[str, Any]
) -> Iterator[tuple[dict[tuple[str, int], float], Callable[[Found], None]]]:
    """-> what is known of each slot and draw, and what adds to it; a journal `file` keeps it if the run is killed."""
    with nullcontext() if file is None else open_journal(file, settings, _trial, what="measurement") as journal:
        known = {} if journal is None else dict(journal.entries)

        def keep(found: Found) -> None:
            known[found.slot, found.draw] = found.delta
            if journal is not None and math.isfinite(found.delta):
                journal.append({"slot": found.slot, "level": found.draw, "delta": found.delta})

        yield known, keep


def _trial(entry: dict[str, Any]) -> tuple[tuple[str, int], float]:
    return (str(entry["slot"]), int(entry["level"])), float(entry["delta"])


def measure_for(
    problem: Problem, run: RunDirectory | None, monitor: Monitor, device: str, pool: Pool | None = None
) -> Sensitivity:
    """The slopes that the problem's budget needs, measured as it says; the run directory keeps finished trials."""
    budget = problem.budget
    assert budget is not None
    activations = (budget.kv, budget.inputs, budget.read)
    kinds = KINDS if any(limit is not None for limit in activations) else ("weight",)
    by_gradients = _method(budget.method, budget.metric) == "gradients"
    if by_gradients and pool is not None and not isinstance(pool, Here):
        monitor.note("one process measures the sensitivities by gradients; with budget.method=noise workers share them")
    with renaming(_OF_BUDGET):
        blocks = _blocks(problem.source, budget.source, budget.sequences, budget.seq_len, problem.seed, device)
        return measure_on(
            problem.source, blocks, metric=budget.metric, kinds=kinds, fold=problem.folded, method=budget.method,
            levels=budget.levels, seed=problem.seed, device=device, monitor=monitor,
            pool=pool if device == "cpu" else None, progress_file=run.path / "slopes.jsonl" if run else None,
        )  # fmt: skip


def some_blocks(problem: Problem, sensitivity: Sensitivity, monitor: Monitor, device: str) -> TokenBlocks:
    """A few sequences of the text that the slopes were measured on, no more of it than they took.

    If a file's slopes are of a text that is not here, the model samples one, and a note says so.
    """
    budget, source, text = problem.budget, problem.source, sensitivity.text
    assert budget is not None
    limit = context_of(source.config) or budget.seq_len
    seq_len = max(2, min(budget.seq_len, limit, text.tokens))
    sequences = max(1, min(SOME, text.tokens // seq_len))
    try:
        return _blocks(source, text.source, sequences, seq_len, problem.seed, device)
    except PaleyError as error:
        if text.source in (SELF, RANDOM):
            raise
        monitor.note(f"budget: keys, values and inputs are measured on text that the model samples instead ({error})")
        return _blocks(source, SELF, sequences, seq_len, problem.seed, device)


def _blocks(source: Source, text: str, sequences: int, seq_len: int, seed: int, device: str) -> TokenBlocks:
    tokenizer = source.tokenizer()
    if text == SELF:
        ids = sample_documents(source.load(device=device), tokenizer, count=sequences, tokens=seq_len, seed=seed)
        return blocks_from_ids(ids, "calibration", SELF)
    if text == RANDOM:
        return blocks_from_ids(random_ids(tokenizer, source, sequences, seq_len, seed), "calibration", RANDOM)
    blocks = token_blocks(text, tokenizer, role="calibration", count=sequences, seq_len=seq_len, seed=seed)
    check_vocabulary(blocks.ids, source.sites.embedding.shape[0], blocks.source)
    return blocks


def random_ids(
    tokenizer: PreTrainedTokenizerBase, source: Source, sequences: int, seq_len: int, seed: int
) -> torch.Tensor:
    """-> ids [sequences, seq_len], uniform over the tokenizer's vocabulary, each sequence from BOS if there is one."""
    if sequences < 1 or seq_len < 2:
        raise PaleyError(f"random: needs sequences >= 1 and seq_len >= 2, got {sequences} and {seq_len}")
    # The embedding may have rows for padding that no text reaches.
    vocabulary = min(len(tokenizer), source.config.vocab_size)
    ids = torch.randint(vocabulary, (sequences, seq_len), generator=torch.Generator().manual_seed(seed))
    if (bos := cast("int | None", tokenizer.bos_token_id)) is not None:
        ids[:, 0] = bos
    return ids
