"""Files that are either whole or absent: a temporary name, fsync, then an atomic rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from paley.core.errors import PaleyError

__all__ = ["copy_companions", "read_json", "temporary", "write_atomic", "write_json"]

Chunk = bytes | memoryview

# Carried over as they are; everything else in a model's folder is weights, or not the model's.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = "copy or download it again"


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Writes the file whole or not at all; text as UTF-8. PaleyError where the disk refuses."""
    chunk = data.encode() if isinstance(data, str) else data
    write_whole(Path(path), [chunk], len(chunk))


def write_json(path: str | Path, obj: object) -> None:
    """Writes obj as strict JSON, keys in their order, indented, with a newline at the end."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PaleyError(f"{path}: cannot be written as JSON: {error}") from None
    write_atomic(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; PaleyError says why there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PaleyError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, nesting without end
        raise PaleyError(f"{path}: is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(found, dict):
        raise PaleyError(f"{path}: must be a JSON object, got {type(found).__name__}; {_AGAIN}")
    return found


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what stands beside a model's weights into `folder`: tokenizer, generation config, chat template."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            with _disk(folder / name, (source / name).stat().st_size):
                shutil.copyfile(source / name, folder / name)


def temporary(path: Path) -> Path:
    """Where `path` is written first; what a killed run left there is overwritten by the next."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, chunks: Iterable[Chunk], needed: int) -> None:
    """Writes the chunks, `needed` bytes in all, under a temporary name, and renames that to `path`."""
    write_synced(temporary(path), chunks, needed)
    publish([(temporary(path), path)])


def write_synced(path: Path, chunks: Iterable[Chunk], needed: int) -> None:
    """Writes the chunks, `needed` bytes in all, through to the disk; a failure leaves no file behind."""
    try:
        with _disk(path, needed), path.open("wb") as file:
            for chunk in chunks:
                _write(file, chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def publish(moves: Sequence[tuple[Path, Path]]) -> None:
    """Renames files of one folder, in this order, and syncs it; a failure removes those not yet renamed."""
    try:
        for before, after in moves:
            with _disk(after):
                os.replace(before, after)
    finally:
        for before, _ in moves:
            before.unlink(missing_ok=True)
    if moves and os.name == "posix":  # elsewhere a folder cannot be opened
        folder = moves[0][1].parent
        with _disk(folder):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _write(file: BinaryIO, chunk: Chunk) -> None:
    file.write(chunk)


@contextmanager
def _disk(path: Path, needed: int = 0) -> Iterator[None]:
    """What the system says about writing `path`, as PaleyError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise PaleyError(f"{path}: cannot be written: {error.strerror or error}") from error
        free = shutil.disk_usage(path.parent).free
        raise PaleyError(
            f"{path.parent}: the disk is full, or your share of it: {path.name} needs {needed:,} bytes, "
            f"{free:,} are free now; make room there, or write to another folder"
        ) from error
