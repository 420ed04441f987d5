"""The trials of a sensitivity, made here or by the workers of a pool: each is noise at one place, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from paley.core.errors import PaleyError
from paley.methods.sensitivity import Trial
from paley.model.adapter import Adapter
from paley.model.fold import fold_norms_
from paley.model.loading import Source, open_source
from paley.model.replay import runner_of
from paley.model.sensitivity import NoiseProbe
from paley.model.trials import Metric
from paley.pipeline.pool import Here, Pool

__all__ = ["NO_NOISE", "Found", "Probing", "make_trial", "trials"]

NO_NOISE: Trial = ("", 0.0, 0)  # tells the baseline alone


@dataclass(frozen=True)
class Found:
    """What noise of size t, drawn as `draw`, added to the loss at `slot`; baseline: the loss without."""

    slot: str
    t: float
    draw: int
    delta: float
    baseline: float


@dataclass(frozen=True, eq=False)
class Probing:
    """What is measured, and how; model: a folder that all workers see. ids int64 [sequences, seq_len].

    key: of the same job, in a worker that has made trials of it before.
    """

    model: str
    fingerprint: str
    ids: Tensor
    metric: Metric
    kinds: tuple[str, ...]
    fold: bool
    seed: int
    device: str
    key: str

    def probe(self, source: Source, *, paged: bool) -> NoiseProbe:
        """paged: one block at a time is read and held; what it finds is the same to the bit."""
        adapter = Adapter(source.load(device=self.device, blocks=not paged))
        runner = runner_of(adapter)
        if paged:
            runner.held = source.pages(adapter).held
        if self.fold:
            fold_norms_(adapter)
        ids = self.ids.to(self.device)
        return NoiseProbe(runner, ids, metric=self.metric, kinds=self.kinds, rotated=self.fold, seed=self.seed)

    def can_page(self, source: Source) -> bool:
        """Whether a block can be measured as the file holds it: gains are folded into all of them at once."""
        return source.has_pages and not self.fold and self.device == "cpu"


_HELD: dict[str, NoiseProbe] = {}  # of one job at a time


def make_trial(item: tuple[Probing, Trial]) -> Found:
    """In a worker, which opens the model once, and holds a block of it if it can.

    Errors: PaleyError, also if it sees other weights than the driver.
    """
    job, trial = item
    if job.key not in _HELD:
        _HELD.clear()
        source = open_source(job.model)
        if source.fingerprint != job.fingerprint:
            raise PaleyError(f"{job.model}: a worker sees other weights here; put the model on storage that all share")
        _HELD[job.key] = job.probe(source, paged=job.can_page(source))
    return _made(_HELD[job.key], trial)


def _made(probe: NoiseProbe, trial: Trial) -> Found:
    return Found(*trial, 0.0 if trial == NO_NOISE else probe.delta(*trial), probe.baseline)


@contextmanager
def trials(
    job: Probing, source: Source, pool: Pool, *, paged: bool = False
) -> Iterator[Callable[[Sequence[Trial]], Iterable[Found]]]:
    """-> what makes trials, as they come; source: of the job's model, for a pool that is this process; paged: as of
    `Probing.probe`, there."""
    if isinstance(pool, Here):
        probe = job.probe(source, paged=paged)
        yield lambda wanted: (_made(probe, trial) for trial in wanted)
        return
    try:
        yield lambda wanted: pool.run(make_trial, [(job, trial) for trial in wanted])
    finally:
        _HELD.clear()  # a pool makes a single trial here
        pool.release()
