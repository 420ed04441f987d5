"""The run directory `OUT.run`: what a run has finished so far, so that a killed one goes on where it was.

Every file in it is either absent or whole. The output folder appears at the end, by one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from paley.core.errors import PaleyError
from paley.format.files import write_json
from paley.plan import Trial

__all__ = ["RunDirectory", "open_run"]

RESULTS = "results.json"


class RunDirectory:
    """`path` holds the run's stages, `output` is where its checkpoint goes; `key` names what is being made."""

    def __init__(self, output: Path, key: str):
        self.output, self.key = output, key
        self.path = output.with_name(output.name + ".run")
        self.checkpoint = self.path / "checkpoint"

    def block_file(self, stage: str, index: int) -> Path:
        """Where the codes of block `index` of a stage ('draft' or 'final') are kept."""
        folder = self.path / stage
        folder.mkdir(exist_ok=True)
        return folder / f"block-{index:04d}.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the output folder is already what this run would make."""
        return _run_key(self.output / RESULTS) == self.key

    def trials(self) -> list[Trial]:
        """The search's trials so far; a last line cut off by a kill is dropped."""
        file = self.path / "trace.jsonl"
        if not file.exists():
            return []
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole)
        try:
            return [Trial.model_validate_json(line) for line in whole.splitlines()]
        except ValidationError as error:
            raise PaleyError(f"{file}: is damaged ({error}); start anew with --overwrite") from error

    def add_trial(self, trial: Trial) -> None:
        with (self.path / "trace.jsonl").open("a") as file:
            file.write(trial.model_dump_json() + "\n")

    def publish(self) -> None:
        """Makes the finished checkpoint the output folder, in place of an older one, and removes the run."""
        old = self.path / "replaced"
        if self.output.exists() and self.checkpoint.exists():
            self.output.rename(old)
        if self.checkpoint.exists():
            self.checkpoint.rename(self.output)
        shutil.rmtree(self.path)


@contextmanager
def open_run(output: Path, key: str, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Creates or continues the run directory of `output`, locked against a second run.

    Errors: an output or an unfinished run that neither flag allows to touch; an unfinished run with other
    settings; a run at work.
    """
    run = RunDirectory(output, key)
    fresh = not run.path.exists()
    if output.exists() and not (overwrite or (resume and (run.finished or not fresh))):
        hint = "it was made with other settings; " if resume else ""
        raise PaleyError(f"{output}: exists already; {hint}choose another --output, or replace it with --overwrite")
    if not fresh and not (resume or overwrite):
        raise PaleyError(f"{run.path}: an unfinished run is here; go on with --resume, or start anew with --overwrite")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = (run.path / "lock").open("a")
    except OSError as error:
        raise PaleyError(f"{run.path}: cannot be written ({error}); choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PaleyError(
                f"{output}: another run is at work on it; wait for it, or choose another --output"
            ) from None
        settings = run.path / "run.json"
        if not resume:
            _clear(run.path)
        elif settings.exists() and _run_key(settings) != key:
            raise PaleyError(
                f"{run.path}: the unfinished run there is of another model or other settings; repeat its command "
                "with --resume, or start anew with --overwrite"
            )
        write_json(settings, {"run": key})
        yield run


def _clear(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.name == "lock":
            continue
        shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


def _run_key(file: Path) -> str | None:
    try:
        return json.loads(file.read_text()).get("run")
    except (OSError, ValueError, AttributeError):
        return None
