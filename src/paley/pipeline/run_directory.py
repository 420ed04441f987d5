"""The run directory `OUT.run`: what a run has finished so far, so that a killed one goes on where it was.

Every file in it is either absent or whole. The output folder appears at the end, by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paley.core.errors import PaleyError
from paley.format.files import write_json
from paley.format.folders import LOCK, RESULTS, check_free, exchange, locked, restore
from paley.plan import Trial

__all__ = ["RunDirectory", "check_output", "open_run"]

SETTINGS = "run.json"
_CLEARED = "cleared"


class RunDirectory:
    """`path` holds the run's stages, `output` is where its checkpoint goes; `key` names what is being made.

    Both are absolute. PaleyError for an `output` that has no name, such as `/`.
    """

    def __init__(self, output: Path, key: str):
        self.output, self.key = Path(os.path.realpath(output)), key
        if not self.output.name:
            raise PaleyError(f"{output}: is no name for a new folder; choose another --output")
        self.path = self.output.with_name(self.output.name + ".run")
        self.checkpoint = self.path / "checkpoint"
        self.replaced = self.path / "replaced"

    def block_file(self, stage: str, index: int) -> Path:
        """Where the codes of block `index` of a stage ('draft' or 'final') are kept."""
        folder = self.path / stage
        folder.mkdir(exist_ok=True)
        return folder / f"block-{index:04d}.safetensors"

    def tensor_file(self, name: str) -> Path:
        """Where the codes of the weight `name` are kept while a run takes tensors one by one."""
        folder = self.path / "final"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.safetensors"

    def fresh_checkpoint(self) -> Path:
        """An empty folder for the checkpoint, whatever a killed run left there."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir(parents=True)
        return self.checkpoint

    @property
    def finished(self) -> bool:
        """Whether the output folder is what this run makes, and not an older one that it is still to replace."""
        replaces = _read(self.path / SETTINGS).get("replaces") and not self.replaced.exists()
        return _read(self.output / RESULTS).get("run") == self.key and not replaces

    @property
    def has_progress(self) -> bool:
        """Whether a resumed run would have anything but the original's scores to start from."""
        kept = ("slopes.jsonl", "trace.jsonl", "plan.json", "checkpoint", "draft", "final")
        return any((self.path / name).exists() for name in kept)

    def check_texts(self, hashes: dict[str, str]) -> None:
        """Raises where the texts' sha256 are not those that the run began with: its parts would not fit together."""
        file = self.path / "texts.json"
        if not file.exists():
            write_json(file, hashes)
        elif _read(file) != hashes:
            changed = ", ".join(role for role, sha256 in _read(file).items() if hashes.get(role) != sha256)
            raise PaleyError(
                f"{self.path}: the {changed} text has changed since this run began; start anew with --overwrite"
            )

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

    def remove(self) -> None:
        """Deletes the run directory, run.json last, so that a kill in between leaves one that is known as ours."""
        write_json(self.path / SETTINGS, {"run": _CLEARED})
        for entry in self.entries():
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        shutil.rmtree(self.path)

    def entries(self) -> list[os.DirEntry[str]]:
        """What the run has made: all but the lock, the settings, and files half written."""
        return [e for e in os.scandir(self.path) if e.name not in (LOCK, SETTINGS) and not e.name.startswith(".")]

    def publish(self) -> None:
        """Makes the finished checkpoint the output folder, in place of an older one, and removes the run."""
        if self.checkpoint.exists():
            if self.output.exists() and not _read(self.path / SETTINGS).get("replaces"):
                raise PaleyError(
                    f"{self.output}: appeared while this run was at work; move it away and run again with --resume"
                )
            exchange(self.checkpoint, self.output, self.replaced)
        self.remove()


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises where an output or an unfinished run is in the way; needs no key, so that nothing is read before."""
    run = RunDirectory(output, "")
    if overwrite or not resume:
        check_free(output, overwrite=overwrite)
    if run.path.exists() and not (resume or overwrite):
        raise PaleyError(f"{run.path}: an unfinished run is here; go on with --resume, or start anew with --overwrite")


@contextmanager
def open_run(output: Path, key: str, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Creates or continues the run directory of `output`, locked against a second run.

    Errors: an output or an unfinished run that neither flag allows to touch; an unfinished run with other
    settings; a run at work.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    run = RunDirectory(output, key)
    if run.output.exists() and not (overwrite or run.path.exists() or run.finished):
        raise PaleyError(
            f"{output}: exists already; it was made with other settings; choose another --output, or replace it with "
            "--overwrite"
        )
    with locked(run.path, output):
        settings = run.path / SETTINGS
        state = _read(settings).get("run")
        if not resume or state in (None, _CLEARED):
            restore(run.checkpoint, run.output, run.replaced)  # where the run there was killed as it published
            _start(run, replaces=overwrite and run.output.exists())
        elif state != key:
            raise PaleyError(
                f"{run.path}: the unfinished run there is of another model or other settings; repeat its command "
                "with --resume, or start anew with --overwrite"
            )
        try:
            yield run
        except PaleyError:
            if not run.has_progress:  # refused before anything was made: leave no trace
                run.remove()
            raise


def _start(run: RunDirectory, *, replaces: bool) -> None:
    """Empties the run directory and writes what run this is; killed in between, it is known to be half emptied."""
    settings = run.path / SETTINGS
    entries = run.entries()
    if entries and not settings.exists():
        raise PaleyError(f"{run.path}: is no run directory of Paley; move it away, or choose another --output")
    write_json(settings, {"run": _CLEARED})
    for entry in entries:
        shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
    write_json(settings, {"run": run.key, "replaces": replaces})


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in the file; an empty one where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
