"""Publishing: a finished output appears in one step, and nothing is lost if a run is killed at any time.

A folder is made in a locked work folder beside its place and swapped in. A single file is written by
`core.files.write_atomic`; `check_file` checks its place before the work begins.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from paley.core.errors import PaleyError
from paley.core.files import disk
from paley.core.reading import read_json
from paley.format.files import write_json
from paley.format.locks import LOCK, locked

__all__ = ["RESULTS", "Work", "check_file", "exchange", "restore", "unfinished"]

RESULTS = "results.json"  # its key "run" marks a folder made by Paley, which --overwrite may replace
# The work folder holds: its state, the new output, the older one during the swap, and what could not be deleted.
STATE, NEW, REPLACED, DISCARDED = "run.json", "new", "replaced", "discarded-"
_CLEARED = "cleared"


def check_file(output: Path, what: str, *, overwrite: bool) -> None:
    """Raises PaleyError if `what`, such as "the plan's file", cannot be written to `output`."""
    if output.is_dir():
        raise PaleyError(f"{output}: is a folder; give {what}")
    if not output.absolute().parent.is_dir():
        raise PaleyError(f"{output}: there is no folder {output.parent}; make it first")
    if output.exists() and not overwrite:
        raise _taken(output)


def unfinished(path: Path, what: str) -> PaleyError:
    """The error for an earlier run's unfinished work at `path`."""
    return PaleyError(f"{path}: an unfinished {what} is here; go on with --resume, or start anew with --overwrite")


class Work:
    """The place `output` of a new folder, and the work folder `path` beside it, where the folder `new` is made.

    Both paths are absolute. resumable: the work folder is visible, OUTPUT.run, and a run that is stopped leaves it for
    the next one to go on with; else it is hidden, .OUTPUT.tmp, and always cleared. PaleyError if `output` has no name,
    such as `/`.
    """

    def __init__(self, output: str | Path, *, resumable: bool = False):
        self.key, self.resumable = "", resumable
        self._given = Path(output)  # as errors call it
        self.output = Path(os.path.realpath(output))
        if not self.output.name:
            raise PaleyError(f"{output}: is no name for a new folder; choose another --output")
        name = f"{self.output.name}.run" if resumable else f".{self.output.name}.tmp"
        self.path = self.output.with_name(name)
        self.new = self.path / NEW
        self.replaced = self.path / REPLACED
        self.files = ExitStack()  # open files of the work folder; closed before it is cleared

    @property
    def finished(self) -> bool:
        """Whether the output is what this run makes, and not an older folder that it has yet to replace."""
        replaces = self._state.get("replaces") and not self.replaced.exists()
        return _read(self.output / RESULTS).get("run") == self.key and not replaces

    @property
    def has_progress(self) -> bool:
        """Whether a refused run leaves work that a later one can resume; classes of resumable runs override it."""
        return False

    def check_apart(self, model: Path) -> None:
        """Raises PaleyError if making the output would delete the model or the current folder."""
        for what, path in (("the model", model), ("the current folder", Path.cwd())):
            path = path.resolve()
            if path.is_relative_to(self.output):
                raise PaleyError(f"{self._given}: holds {what} {path}; choose another --output")
            if path.is_relative_to(self.path):
                raise PaleyError(f"{self._given}: is made in {self.path}, which holds {what}; choose another --output")

    def check_free(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Raises PaleyError if something is in the way that neither flag allows to touch.

        `open` calls it too; a call of its own refuses before any model is read.
        """
        with disk(self._given):
            if self.output.exists() and (overwrite or not resume):
                if not overwrite:
                    raise _taken(self._given)
                self._check_ours()
            if not self._is_work_folder():
                raise PaleyError(f"{self.path}: is no work folder of Paley; move it away, or choose another --output")
            in_the_way = self.resumable and self.path.exists() and self._state.get("run") != _CLEARED
            if in_the_way and not (resume or overwrite):
                raise unfinished(self.path, "run")

    @contextmanager
    def open(self, key: str, *, resume: bool = False, overwrite: bool = False) -> Iterator[Self]:
        """Makes or continues the locked work folder; a run in it fills `new` and then calls `publish`.

        key: what is being made; results.json of the new folder must have it as "run". Errors: PaleyError as in
        `check_free`, also if another run is at work, or the unfinished one has another key.
        """
        self.key = key
        self.check_free(resume=resume, overwrite=overwrite)
        with locked(self.path, self._given), self.files:
            self._begin(resume=resume, overwrite=overwrite)
            try:
                yield self
            except PaleyError:
                if not self.has_progress:  # refused before anything was made: leave no trace
                    self._clear()
                raise
            finally:
                if not self.resumable:
                    self._clear()

    def publish(self) -> tuple[Path, ...]:
        """Makes `new` the output, in place of an older one, and clears the work folder.

        Returns the paths that could not be deleted.
        """
        if self.new.exists():
            if self.output.exists():
                if not self._state.get("replaces"):
                    again = " with --resume" if self.resumable else ""
                    raise PaleyError(
                        f"{self.output}: appeared while this run was at work; move it away and run again{again}"
                    )
                self._check_ours()
            exchange(self.new, self.output, self.replaced)
        return self._clear()

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        """Goes on with the run that is there, or clears it and writes which run this is."""
        state = self._state.get("run", _CLEARED)
        if resume and state != _CLEARED:
            if state != self.key:
                raise PaleyError(
                    f"{self.path}: the unfinished run there is of another model or other settings, or of another "
                    "version of Paley; repeat its command with --resume, or start anew with --overwrite"
                )
            return
        restore(self.new, self.output, self.replaced)  # if the run there was killed as it published
        if self.output.exists() and not overwrite:
            if not resume:
                raise _taken(self._given)
            if not self.finished:
                raise PaleyError(
                    f"{self._given}: exists already; it was made with other settings; choose another --output, or "
                    "replace it with --overwrite"
                )
        left = [path for path in self._clear() if not path.name.startswith(DISCARDED)]
        if left:
            raise PaleyError(f"{left[0]}: cannot be deleted; delete it yourself, or choose another --output")
        write_json(self.path / STATE, {"run": self.key, "replaces": overwrite and self.output.exists()})

    @property
    def _state(self) -> dict[str, Any]:
        return _read(self.path / STATE)

    def _entries(self) -> list[Path]:
        """What the work folder holds beside its lock and its state."""
        return sorted(path for path in self.path.iterdir() if path.name not in (LOCK, STATE))

    def _clear(self) -> tuple[Path, ...]:
        """Deletes the work folder's contents, the state last. Returns the paths that could not be deleted.

        Folders that cannot be deleted are renamed, so that a later run is not blocked.
        """
        self.files.close()
        restore(self.new, self.output, self.replaced)
        if self._entries():
            write_json(self.path / STATE, {"run": _CLEARED})  # if killed from here on, nothing is left to resume
        for path in self._entries():
            if path.name.startswith(DISCARDED):
                continue
            with suppress(OSError):  # it is returned
                if path.is_dir() and not path.is_symlink():
                    path.rename(tempfile.mkdtemp(prefix=DISCARDED, dir=self.path))
                else:
                    path.unlink()
        for path in self.path.glob(DISCARDED + "*"):
            shutil.rmtree(path, ignore_errors=True)
        left = self._entries()
        if not left:
            (self.path / STATE).unlink(missing_ok=True)
        return tuple(left)

    def _check_ours(self) -> None:
        """Raises PaleyError if the folder in the output's place is neither made by Paley nor empty."""
        ours = "run" in _read(self.output / RESULTS)
        if not ours and not (self.output.is_dir() and not any(self.output.iterdir())):
            raise PaleyError(
                f"{self._given}: was not made by Paley, so --overwrite does not delete it; move it away yourself"
            )

    def _is_work_folder(self) -> bool:
        """Whether a run may clear the folder at `path`: it is absent, empty, or has the state of a run."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False
        # The state is the first file that a run writes: one killed before leaves at most its temporary file.
        return "run" in self._state or all(name == LOCK or name.startswith(f".{STATE}.") for name in names)


def _taken(output: Path) -> PaleyError:
    return PaleyError(f"{output}: exists already; choose another --output, or replace it with --overwrite")


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in the file; an empty one if there is none."""
    try:
        return read_json(file)
    except PaleyError:
        return {}


def exchange(new: Path, place: Path, aside: Path) -> None:
    """`new` becomes `place`, and what was there goes `aside`; killed between the two, `restore` brings it back.

    Errors: PaleyError if the system refuses; everything is then in its old place.
    """
    restore(new, place, aside)
    try:
        if place.exists():
            place.rename(aside)
        new.rename(place)
    except OSError as error:
        restore(new, place, aside)
        why = error.strerror or error
        raise PaleyError(f"{place}: cannot be written: {why}; clear the place, or choose another --output") from error


def restore(new: Path, place: Path, aside: Path) -> None:
    """Undoes half an exchange; does nothing after a whole one, or none.

    PaleyError if something else has come to `place` meanwhile: `aside` is then the only copy of what was there.
    """
    if not aside.exists():
        return
    if not place.exists():
        try:
            aside.rename(place)
        except OSError as error:
            why = error.strerror or error
            raise PaleyError(f"{place}: cannot be put back ({why}); move {aside} there yourself") from error
    elif new.exists():  # it is gone once the exchange is whole
        raise PaleyError(
            f"{place}: exists already, while {aside} has what a stopped run was to replace; move one of the two away"
        )
