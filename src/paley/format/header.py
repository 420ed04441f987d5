"""Reads and writes the header of a safetensors file.

Layout: u64 little-endian length of the header; the header, a JSON object name -> {"dtype", "shape",
"data_offsets": [begin, end]}; the tensors' bytes without gaps. Paley parses it without the library for two reasons:
errors name the tensor, and tensors own their memory, while the library's share one private mapping.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["DTYPES", "TensorInfo", "as_bytes", "header_bytes", "parts_of", "read_header", "read_metadata"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: its bytes begin at `start` of `file`, row-major, little-endian."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in its own memory."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")  # the default device may be `meta`
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                got = file.readinto(buffer.numpy().data)
        except OSError as error:
            raise PaleyError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        if got != self.nbytes:
            raise PaleyError(f"{self.file}: became shorter while it was read; {_AGAIN}")
        return buffer.view(self.dtype).reshape(self.shape)


def parts_of(info: TensorInfo) -> Iterator[Tensor]:
    """The tensors that a stack [n, ...] consists of, one in memory at a time where its kind can be read so."""
    if type(info) is not TensorInfo:
        whole = getattr(info, "parts", None)
        yield from info.read() if whole is None else whole()
        return
    size = info.nbytes // info.shape[0]
    for index in range(info.shape[0]):
        yield TensorInfo(info.file, info.dtype, info.shape[1:], info.start + index * size).read()


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor on the CPU -> its bytes, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header of the file that holds the tensors in this order, padded to a multiple of 8 bytes."""
    about = {"format": "pt"} | dict(metadata or {})  # transformers requires a format
    entries: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor; PaleyError unless header and file size fit together in every respect."""
    entries, data_start, size = _read_json(file)
    _take_metadata(file, entries)
    places = {name: _place(file, name, entry, data_start) for name, entry in entries.items()}
    end = data_start
    for name, info in sorted(places.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            what = "overlaps another tensor" if info.start < end else "leaves a gap before it"
            raise PaleyError(f"{file}: corrupted header: the place of {name!r} {what}; {_AGAIN}")
        end += info.nbytes
        if end > size:
            raise PaleyError(f"{file}: truncated: {name!r} ends at byte {end:,}, the file at {size:,}; {_AGAIN}")
    if end != size:
        raise PaleyError(f"{file}: corrupted: {size - end:,} bytes follow the last tensor; {_AGAIN}")
    return places


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header: texts by name."""
    return _take_metadata(file, _read_json(file)[0])


def _take_metadata(file: Path, entries: dict[str, Any]) -> dict[str, str]:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PaleyError(f"{file}: corrupted header: __metadata__ must map text to text; {_AGAIN}")
    return metadata


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """-> (the header's entries, the offset of the data, the file's size)."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > MAX_HEADER:
                raise PaleyError(f"{file}: no safetensors file, or its first 8 bytes are corrupted; {_AGAIN}")
            if length > size - 8:
                raise PaleyError(f"{file}: truncated: {size:,} bytes, the header alone is {length:,}; {_AGAIN}")
            text = stream.read(length)
    except OSError as error:
        raise PaleyError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PaleyError(f"{file}: corrupted header: not JSON ({error}); {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise PaleyError(f"{file}: corrupted header: a JSON object must be there; {_AGAIN}")
    return entries, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _place(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked by itself."""
    where = f"{file}: corrupted header: {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PaleyError(f"{where} must have dtype, shape and data_offsets; {_AGAIN}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise PaleyError(f"{where} has dtype {kind!r}; known are {', '.join(DTYPES)}")
    if not (_naturals(shape) and _countable(shape) and _naturals(offsets) and len(offsets) == 2):
        raise PaleyError(f"{where} has a shape or data_offsets that no tensor can have; {_AGAIN}")
    info = TensorInfo(file, DTYPES[kind], tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise PaleyError(f"{where} is {kind} {shape}, {info.nbytes:,} bytes, but data_offsets are {offsets}; {_AGAIN}")
    return info


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _countable(shape: list[int]) -> bool:
    """Whether torch can make such a tensor: strides and sizes fit in 63 bits, even if a dimension is 0."""
    return len(shape) <= 64 and math.prod(n or 1 for n in shape) < 2**60
