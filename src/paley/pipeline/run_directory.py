"""The run directory `OUT.run`: what a run has finished so far, so that a killed one goes on where it was.

Every file in it is either absent or whole; in a journal, every line.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from paley.core.errors import PaleyError
from paley.core.reading import read_json
from paley.format.files import write_json
from paley.format.journal import Journal, open_journal
from paley.format.publish import Work
from paley.plan import Trial

__all__ = ["LAYOUT", "RunDirectory"]

LAYOUT = 4  # of the files of the stages; a run goes on only with files of its own layout


class RunDirectory(Work):
    """The work folder of a quantize run: `checkpoint` becomes the output; beside it lie the files of the stages."""

    def __init__(self, output: str | Path):
        super().__init__(output, resumable=True)
        self.checkpoint = self.new
        self._trace: Journal[Trial] | None = None

    def stage_file(self, stage: str, name: str) -> Path:
        """Where the codes of a step, or of a weight, of a stage ('draft' or 'final') are kept."""
        folder = self.path / stage
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.safetensors"

    def block_files(self) -> list[Path]:
        """The files of the blocks that are finished, in order."""
        return sorted((self.path / "final").glob("block-*.safetensors"))

    def fresh_checkpoint(self) -> Path:
        """An empty folder for the checkpoint, whatever a killed run left there."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir(parents=True)
        return self.checkpoint

    def sweep(self) -> None:
        """Removes files of the checkpoint that a killed run was writing: whole ones have another name."""
        for left in self.checkpoint.glob(".*.tmp"):
            left.unlink()

    @property
    def has_progress(self) -> bool:
        """Whether a resumed run would have anything but the original's scores to start from."""
        kept = ("slopes.jsonl", "trace.jsonl", "plan.json", self.new.name, "draft", "final")
        return any((self.path / name).exists() for name in kept)

    def check_texts(self, hashes: dict[str, str]) -> None:
        """Raises PaleyError if the texts' sha256 are not those that the run began with: its parts would not match."""
        file = self.path / "texts.json"
        if not file.exists():
            write_json(file, hashes)
        elif (begun := read_json(file)) != hashes:
            changed = ", ".join(role for role, sha256 in begun.items() if hashes.get(role) != sha256)
            raise PaleyError(
                f"{self.path}: the {changed} text has changed since this run began; start anew with --overwrite"
            )

    def trials(self) -> list[Trial]:
        """The search's trials so far; from then on `add_trial` takes more."""
        journal = open_journal(self.path / "trace.jsonl", {"run": self.key}, Trial.model_validate, what="search")
        self._trace = self.files.enter_context(journal)
        return self._trace.entries

    def add_trial(self, trial: Trial) -> None:
        """Appends to the trace that `trials` has opened."""
        assert self._trace is not None
        self._trace.append(trial.model_dump(mode="json"))
