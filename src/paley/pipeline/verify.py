"""`paley.verify`: whether a folder still holds what was written, byte by byte, at the speed of the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.format.digests import DIGESTS, Digests, FileDigest, sha256
from paley.format.files import all_files

__all__ = ["Verified", "verify"]

_CARD = "README.md"  # for people alone, who add to it


@dataclass(frozen=True)
class Verified:
    """A folder in which nothing is damaged. seconds: of reading `bytes` in `files` files.

    edited: the model card, if it was changed. not_covered: files that were added since, which nothing checks.
    """

    folder: Path
    files: int
    bytes: int
    seconds: float
    edited: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()


def verify(path: str | Path, *, on_file: Callable[[int, str], None] = lambda total, name: None) -> Verified:
    """Compares every file of a folder that Paley wrote with its sha256 in digests.json.

    on_file hears of each file that was read, and how many there are. Errors: PaleyError for a folder without digests,
    and for the first file that is missing or not as written, with the tensor or the key of the config that differs.
    """
    folder, start = Path(path), time.monotonic()
    if not folder.is_dir():
        raise PaleyError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give a folder of Paley's")
    digests = Digests.load(folder)
    states: dict[str, str | None] = {}
    with ThreadPoolExecutor() as pool:
        for name, state in pool.map(lambda item: (item[0], _state(folder, *item)), digests.files.items()):
            states[name] = state
            on_file(len(digests.files), name)
    changed = {name: state for name, state in states.items() if state is not None}
    damaged = [name for name in changed if name != _CARD]
    if damaged:
        _explain(folder, digests, damaged)
        more = f" (and {len(damaged) - 1} more: {', '.join(damaged[1:])})" if len(damaged) > 1 else ""
        raise PaleyError(f"{folder / damaged[0]}: {changed[damaged[0]]}{more}; copy or download it again")
    checkpoint = Checkpoint.open(folder)
    digests.check_config(folder, checkpoint.config)
    if not {info.file.name for info in checkpoint.infos.values()} <= digests.files.keys():
        digests.check_tensors(folder, checkpoint.infos)
    return Verified(
        folder=folder,
        files=len(states),
        bytes=sum(entry.bytes for entry in digests.files.values()),
        seconds=time.monotonic() - start,
        edited=tuple(changed),
        not_covered=tuple(sorted(set(all_files(folder)) - digests.files.keys() - {DIGESTS})),
    )


def _state(folder: Path, name: str, written: FileDigest) -> str | None:
    """What is wrong with a file; None if it is as it was written."""
    file = folder / name
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != written.bytes:
        return f"has {size:,} bytes, was written with {written.bytes:,}"
    return None if sha256(file) == written.sha256 else "is not as it was written"


def _explain(folder: Path, digests: Digests, damaged: list[str]) -> None:
    """Raises an error that names the key or the tensor, if config or weights are at fault."""
    if not any(name == "config.json" or name.endswith(".safetensors") for name in damaged):
        return
    checkpoint = Checkpoint.open(folder)
    digests.check_config(folder, checkpoint.config)
    digests.check_tensors(folder, checkpoint.infos)
