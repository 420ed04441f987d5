"""Reads GGUF files: their keys, and each tensor decoded as it is read, under the name that transformers has for it.

The `gguf` package knows the layout and the types. What it cannot decode, and a file that is not whole, is refused here
before any tensor is read.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from paley.arch import Architecture, Sites, family, sites
from paley.arch.gguf import GGUF, ROPE_FACTORS
from paley.core.errors import PaleyError
from paley.format.header import TensorInfo

__all__ = ["GgufFile", "GgufTensor"]

_AGAIN = "copy or download the file again"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor(TensorInfo):
    """A tensor of type `kind`, `stored` bytes. heads: of rows whose halves RoPE turns together, but that alternate in
    the file; 0: rows are as they are. offset: what the file's values have on top.
    """

    kind: str
    stored: int
    heads: int = 0
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.stored

    def read(self) -> Tensor:
        package, buffer = _package(), bytearray(self.stored)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                got = file.readinto(buffer)
        except OSError as error:
            raise PaleyError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        if got != self.stored:
            raise PaleyError(f"{self.file}: became shorter while it was read; {_AGAIN}")
        data = torch.frombuffer(buffer, dtype=torch.uint8)
        if self.kind in _PLAIN:
            found = data.view(_PLAIN[self.kind]).reshape(self.shape)
        else:
            kind = package.GGMLQuantizationType[self.kind]
            rows = data.view(-1, self.stored // (self._rows or 1)).numpy()
            with importlib.import_module("numpy").errstate(all="ignore"):  # what is not finite is refused by name later
                found = torch.from_numpy(package.dequantize(rows, kind)).reshape(self.shape)
        if self.heads:
            found = found.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return (found - self.offset if self.offset else found).contiguous()

    @property
    def _rows(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True)
class GgufFile:
    """tensors: under their names in the file."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, file: Path) -> GgufFile:
        """Errors: PaleyError for a file that is truncated, or has tensors of a type that nobody here decodes."""
        try:
            stat = file.stat()
        except OSError as error:
            raise PaleyError(f"{file}: cannot be read: {error.strerror or error}") from error
        return _opened(file.resolve(), stat.st_size, stat.st_mtime_ns)

    @classmethod
    def _open(cls, file: Path) -> GgufFile:
        package = _package()
        try:
            reader = package.GGUFReader(file)
            tensors = {tensor.name: _info(file, tensor) for tensor in reader.tensors}
        except OSError as error:
            raise PaleyError(f"{file}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # what a damaged length or number leads to differs
            why = " ".join(str(error).split())[:200]
            raise PaleyError(f"{file}: is no whole GGUF file of types that the gguf package knows: {why}; {_AGAIN}"
                             ) from None  # fmt: skip
        size = os.path.getsize(file)
        for name, info in tensors.items():
            if info.start + info.stored > size:
                raise PaleyError(f"{file}: truncated: {name!r} ends at byte {info.start + info.stored:,}, the file at "
                                 f"{size:,}; {_AGAIN}")  # fmt: skip
            if 0 in info.shape:
                raise PaleyError(f"{file}: {name!r} has shape {list(info.shape)}, which no weight has; {_AGAIN}")
            _check_type(package, file, name, info)
        return cls(file, reader.fields, tensors)

    def get(self, key: str) -> Any:
        """The value of a key; None if it is missing. Errors: PaleyError for a text that is none."""
        try:
            return self.fields[key].contents() if key in self.fields else None
        except (ValueError, LookupError) as error:  # a text is no UTF-8, a type has no values
            raise PaleyError(f"{self.file}: key {key} is damaged: {error}; {_AGAIN}") from None

    def key(self, name: str) -> Any:
        """The same for one of the model's, without the architecture's name."""
        return self.get(f"{self.architecture}.{name}")

    @property
    def architecture(self) -> str:
        if not isinstance(name := self.get("general.architecture"), str):
            raise PaleyError(f"{self.file}: has no general.architecture; {_AGAIN}")
        return name

    def named(self, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """The tensors under transformers' names; config: config.json of the model. Others keep the file's names."""
        row, settings = family(config["model_type"]), SimpleNamespace(**config)
        pairs = GGUF[config["model_type"]].pairs
        model, package = sites(row, settings), _package()
        architecture = next(a for a, name in package.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = package.get_tensor_name_map(architecture, config["num_hidden_layers"])
        left, found = dict(self.tensors), dict[str, TensorInfo]()
        left.pop(ROPE_FACTORS, None)  # the config says it
        for ours in _names(row, model):
            theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
            if theirs is None or (info := left.pop(theirs, None)) is None:
                continue
            site = model.get(ours.rpartition(".")[0])
            heads = 0
            if site is not None and row.rotary_pairs != pairs and site.writes in (row.queries, row.keys):
                heads = settings.num_attention_heads if site.writes == row.queries else settings.num_key_value_heads
            offset = row.gain_offset if site is None else 0.0
            found[ours] = GgufTensor(
                info.file, info.dtype, info.shape, info.start, info.kind, info.stored, heads, offset
            )
        return found | left


def _names(row: Architecture, model: Sites) -> Iterator[str]:
    """Every name that a tensor of the model may have in transformers."""
    for site in model.of("embedding", "linear", "head"):
        yield f"{site.name}.weight"
        yield f"{site.name}.bias"
    for index in range(model.blocks):
        yield from (f"{row.blocks}.{index}.{norm.path}.weight" for norm in row.norms())
    yield f"{row.norm}.weight"


@functools.lru_cache(maxsize=4)
def _opened(file: Path, size: int, changed: int) -> GgufFile:
    """The same one while the file is unchanged, as parsing the list of tokens takes seconds."""
    return GgufFile._open(file)


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise PaleyError(f"the package gguf is missing ({error})", remedy='pip install "paley[gguf]"') from None


def _info(file: Path, tensor: Any) -> GgufTensor:
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    dtype = _PLAIN.get(kind, torch.float32)
    return GgufTensor(file, dtype, shape, int(tensor.data_offset), kind, int(tensor.n_bytes))


def _check_type(package: Any, file: Path, name: str, info: GgufTensor) -> None:
    """Raises unless the package decodes this type: one block of zeros shows it."""
    if info.kind in _PLAIN:
        return
    kind = package.GGMLQuantizationType[info.kind]
    block = torch.zeros(1, package.GGML_QUANT_SIZES[kind][1], dtype=torch.uint8).numpy()
    try:
        package.dequantize(block, kind)
    except NotImplementedError:
        raise PaleyError(f"{file}: {name!r} has type {info.kind}, which the gguf package does not decode; "
                         "quantize the original, or a file of another type") from None  # fmt: skip
