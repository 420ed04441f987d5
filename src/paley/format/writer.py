"""Writes safetensors files as a stream: one shard in memory, whole files or none, always the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.files import Chunk, publish, write_synced, write_whole
from paley.format.files import write_json
from paley.format.header import NAMES, as_bytes, header_bytes

__all__ = ["INDEX", "SINGLE", "ShardWriter", "write_tensors"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one whole safetensors file or nothing. The same tensors, in any order, give the same bytes.

    metadata: texts for the header. Errors: PaleyError if the file cannot be written.
    """
    for name, tensor in tensors.items():
        _check(str(path), name, tensor)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_whole(Path(path), *_contents(plain, metadata))


class ShardWriter:
    """Writes a model's tensors, one after the other, into a folder that holds no model yet.

    Tensors are copied and kept until a shard of max_shard_bytes is full. Readers see nothing until `close`.
    An error inside the `with` block, a failed write, and `abort` remove what was written.
    """

    def __init__(self, folder: str | Path, *, max_shard_bytes: int = 2**30):
        if max_shard_bytes < 1:
            raise PaleyError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self.folder, self.max_shard_bytes = Path(folder), max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # the tensors of each shard on disk
        self._sizes: dict[str, int] = {}  # of all tensors so far, in bytes
        self._closed = False
        self._claim()

    def add(self, name: str, tensor: Tensor, *, own: bool = False) -> None:
        """Takes a copy, or with `own` the tensor itself, which must then not be written to.

        Errors: PaleyError for a name that is taken, a dtype that safetensors lacks, or a full disk.
        """
        if self._closed:
            raise PaleyError(f"{self.folder}: the checkpoint is closed; {name!r} comes too late")
        if name in self._sizes:
            raise PaleyError(f"{self.folder}: tensor {name!r} was added before; use another name")
        _check(str(self.folder), name, tensor)
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        if own:
            self._pending[name] = tensor.detach().to("cpu").contiguous()
        else:  # a copy, as the caller may change the tensor later; contiguous
            self._pending[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._pending_bytes += tensor.nbytes
        self._sizes[name] = tensor.nbytes

    def close(self) -> None:
        """Writes the last shard, gives the shards their names, and writes the index. A second call does nothing."""
        if self._closed:
            return
        if self._pending:
            self._flush(last=True)
        count = len(self._shards)
        if not count:
            raise PaleyError(f"{self.folder}: no tensors were added; a checkpoint needs at least one")
        finals = [self.folder / (SINGLE if count == 1 else shard_name(i, count)) for i in range(count)]
        try:
            publish([(self._part(i), final) for i, final in enumerate(finals)])
            if count > 1:
                self._write_index(finals)
        except BaseException:
            for final in finals:
                final.unlink(missing_ok=True)
            self.abort()
            raise
        self._closed = True

    def abort(self) -> None:
        """Removes the shards written so far; nothing more can be added. Does nothing after `close`."""
        if not self._closed:
            for i in range(len(self._shards)):
                self._part(i).unlink(missing_ok=True)
            self._pending.clear()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _claim(self) -> None:
        """Makes the folder and removes what a killed writer left; raises if a model is in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if taken := sorted(path.name for path in self.folder.glob("model*.safetensors*")):
                raise PaleyError(f"{self.folder}: holds {taken[0]} already; remove it, or write to an empty folder")
            for left in self.folder.glob(".model*.tmp"):
                left.unlink()
        except OSError as error:
            raise PaleyError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _flush(self, *, last: bool = False) -> None:
        i = len(self._shards)
        meant = self.folder / (SINGLE if last and not i else f"model-{i + 1:05d}.safetensors")
        try:
            write_synced(self._part(i), *_contents(self._pending), meant=meant)
        except BaseException:
            self.abort()
            raise
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def _part(self, i: int) -> Path:
        """The file of shard i while the number of shards is unknown."""
        return self.folder / f".model-{i + 1:05d}.safetensors.tmp"

    def _write_index(self, finals: list[Path]) -> None:
        shards = zip(finals, self._shards, strict=True)
        files = sorted((name, final.name) for final, names in shards for name in names)
        total = sum(self._sizes.values())
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(files)})


def shard_name(i: int, count: int) -> str:
    """The Hugging Face name of shard i, counted from 0, of `count`."""
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _check(where: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in NAMES:
        raise PaleyError(f"{where}: {name}: safetensors files hold no {tensor.dtype}; convert it first")
    if name == "__metadata__":
        raise PaleyError(f"{where}: no tensor can be called {name!r}; use another name")


def _contents(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[Iterator[Chunk], int]:
    """-> (the file's bytes in chunks, how many)."""
    # Wide types first, as the library does: then every tensor is aligned in the file.
    order = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = header_bytes(order, metadata)

    def chunks() -> Iterator[Chunk]:
        yield header
        for tensor in order.values():
            yield as_bytes(tensor)

    return chunks(), len(header) + sum(tensor.nbytes for tensor in order.values())
