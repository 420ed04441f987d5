"""Hidden states between the blocks of a calibration, in memory-mapped files: a killed run goes on behind the last one.

The folder `0003` holds the states after three blocks. It is renamed from `next` when its files are on the disk, and the
one before it is deleted then.
"""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.files import disk, publish, sync_folder

__all__ = ["States"]

_NEXT = "next"
_NONE: Mapping[str, Tensor] = {}


class States:
    """The hidden states in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: dict[str, np.memmap] = {}
        self._in_use: list[weakref.ref[Any]] = []

    def place(self, name: str, like: Tensor) -> Tensor:
        """An empty tensor of this shape and type in a file of the folder to come."""
        path = self.folder / _NEXT / f"{name}.npy"
        with self._making(), disk(path, like.nbytes):
            if not self._mapped:
                shutil.rmtree(path.parent, ignore_errors=True)
                path.parent.mkdir(parents=True)
            kind = like.new_empty(0).numpy().dtype
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=tuple(like.shape))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal as pages are written
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._mapped[name] = mapped
        return self._tensor(mapped)

    def drop(self) -> None:
        """Forgets what was placed and not committed."""
        self._mapped.clear()
        shutil.rmtree(self.folder / _NEXT, ignore_errors=True)

    def release(self) -> None:
        """Drops the pages of the files from this process's memory; they are read again when they are needed."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
            return
        self._in_use = [ref for ref in self._in_use if ref() is not None]
        for ref in self._in_use:
            if (mapped := ref()) is not None:
                with suppress(OSError):  # pages that are locked stay
                    mapped._mmap.madvise(mmap.MADV_DONTNEED)  # of a shared mapping, so what was written stays

    def _tensor(self, mapped: np.memmap) -> Tensor:
        self._in_use.append(weakref.ref(mapped))
        return torch.from_numpy(mapped)

    def commit(self, blocks: int, others: Mapping[str, Tensor]) -> None:
        """What `place` gave, and copies of some more tensors, are the states behind so many blocks from now on."""
        for name, tensor in others.items():
            self.place(name, tensor).copy_(tensor)
        before = self._done()
        made = self.folder / _name(blocks)
        with self._making():
            with disk(made):
                for mapped in self._mapped.values():
                    mapped.flush()
                shutil.rmtree(made, ignore_errors=True)
            sync_folder(self.folder / _NEXT)
            publish([(self.folder / _NEXT, made)])
        self._mapped.clear()
        for other in before:
            if other != blocks:
                shutil.rmtree(self.folder / _name(other), ignore_errors=True)

    def last(
        self, like: Mapping[str, Tensor], until_read: Mapping[str, Tensor] = _NONE
    ) -> tuple[int, dict[str, Tensor]] | None:
        """(number of blocks, the states behind them) of a run that was stopped; None if it had not come so far.

        like: tensors of the names, shapes and types of the states. until_read: of some more, which are there or not,
        all of them. Errors: PaleyError for a folder with others.
        """
        if not (done := self._done()):
            return None
        folder = self.folder / _name(done[-1])
        found = {file.name for file in folder.iterdir()}
        if any(f"{name}.npy" in found for name in until_read):
            like = {**like, **until_read}
        if strange := found ^ {f"{name}.npy" for name in like}:
            raise _damaged(folder, f"{', '.join(sorted(strange))} missing, or not of this run")
        return done[-1], {name: self._tensor(_opened(folder / f"{name}.npy", like[name])) for name in like}

    def _done(self) -> list[int]:
        """The numbers whose folders are there, in order; nobody but `commit` gives a folder such a name."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal() and name == _name(int(name)))

    @contextmanager
    def _making(self) -> Iterator[None]:
        """Deletes the folder to come if it cannot be made: its files may be what fills the disk."""
        try:
            yield
        except BaseException:
            self._mapped.clear()
            shutil.rmtree(self.folder / _NEXT, ignore_errors=True)
            raise


def _name(index: int) -> str:
    return f"{index:04d}"


def _opened(file: Path, like: Tensor) -> np.memmap:
    try:
        found = np.load(file, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, f"it is damaged: {' '.join(str(error).split())}") from None
    if (found.shape, found.dtype) != (wanted := (tuple(like.shape), like.new_empty(0).numpy().dtype)):
        raise _damaged(file, f"has {found.dtype} {list(found.shape)}, must have {wanted[1]} {list(wanted[0])}")
    return found


def _damaged(path: Path, what: str) -> PaleyError:
    return PaleyError(f"{path}: {what}; delete the folder of this number, or start anew with --overwrite")
