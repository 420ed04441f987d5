"""Hidden states between the blocks of a calibration, in memory-mapped files: a killed run goes on behind the last one.

Those behind a block have a folder, which gets its name when all of them are on the disk; the one before is deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.files import disk, publish

__all__ = ["States"]

_NEXT = "next"


class States:
    """The hidden states in `folder`, whose number is that of the block which they are behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: dict[str, np.memmap] = {}

    def place(self, name: str, like: Tensor) -> Tensor:
        """An empty tensor of this shape and type in a file of the folder to come."""
        path = self.folder / _NEXT / f"{name}.npy"
        with disk(path, like.nbytes):
            if not self._mapped:
                shutil.rmtree(path.parent, ignore_errors=True)
                path.parent.mkdir(parents=True)
            kind = like.new_empty(0).numpy().dtype
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=tuple(like.shape))
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal as pages are written
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._mapped[name] = mapped
        return torch.from_numpy(mapped)

    def commit(self, index: int, others: Mapping[str, Tensor]) -> None:
        """What `place` gave, and copies of some more tensors, are the states behind block `index` from now on."""
        for name, tensor in others.items():
            self.place(name, tensor).copy_(tensor)
        before = [folder for folder in self.folder.iterdir() if folder.name != _NEXT]
        made = self.folder / f"{index:04d}"
        with disk(made):
            for mapped in self._mapped.values():
                mapped.flush()
            shutil.rmtree(made, ignore_errors=True)
        publish([(self.folder / _NEXT, made)])
        self._mapped.clear()
        for folder in before:
            if folder != made:
                shutil.rmtree(folder, ignore_errors=True)

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """(the block, the states behind it) of a run that was stopped; None if it had not finished a block."""
        if not self.folder.is_dir():
            return None
        done = sorted(int(folder.name) for folder in self.folder.iterdir() if folder.name != _NEXT)
        if not done:
            return None
        files = sorted((self.folder / f"{done[-1]:04d}").glob("*.npy"))
        return done[-1], {file.stem: torch.from_numpy(_opened(file)) for file in files}


def _opened(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PaleyError(
            f"{file}: is damaged ({' '.join(str(error).split())}); delete its folder, or start anew with --overwrite"
        ) from None
