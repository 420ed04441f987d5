"""A folder's tensors as the engine reads them: mapped from their files where these serve, made ready where not."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.grids import FreeGrid
from paley.core.rounding import Outliers, Quantized
from paley.core.schemes import LinearScheme
from paley.format.checkpoint import Checkpoint
from paley.format.spec import (
    BIAS,
    CODES,
    DIAGONAL,
    OUTLIER_COLUMNS,
    OUTLIER_SCALES,
    OUTLIERS,
    PARTS,
    SCALES,
    WEIGHT,
    ZEROS,
    check_values,
    decode_linear,
    expected_tensors,
)
from paley.kernels.stored import StoredWeight
from paley.runtime.support import Facts

__all__ = [
    "Mapped", "check_tensors", "coded_weight", "dense_weight", "error_of_blocks", "floats", "plain_shape",
    "scheme_of", "stored_weight",
]  # fmt: skip

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Mapped:
    """The tensors of a checkpoint by name, as views of their mapped files. A page is read when it is first used."""

    checkpoint: Checkpoint
    _files: dict[Path, Tensor] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def __getitem__(self, name: str) -> Tensor:
        info = self.checkpoint.info(name)
        if info.nbytes == 0:
            return info.read()
        part = self._bytes(info.file)[info.start : info.start + info.nbytes]
        if len(part) != info.nbytes:
            raise PaleyError(f"{info.file}: became shorter while it was read; copy or download the file again")
        if part.data_ptr() % max(4, info.dtype.itemsize):  # other tools align tensors to nothing
            part = part.clone()
        return part.view(info.dtype).view(info.shape)

    def _bytes(self, file: Path) -> Tensor:
        if file not in self._files:
            try:
                with file.open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing is written to it
            except (OSError, ValueError) as error:
                raise PaleyError(f"{file}: cannot be mapped into memory: {error}") from error
            self._files[file] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._files[file]


def check_tensors(facts: Facts) -> None:
    """Raises unless the folder's tensors are just those that its config asks for, of the right shapes and sound."""
    tensors, wanted = Mapped(facts.checkpoint), _expected(facts)
    folder = facts.checkpoint.folder
    for name, (dtype, shape) in wanted.items():
        if name not in tensors:
            if name.endswith(BIAS):
                continue
            raise PaleyError(f"{folder}: tensor {name!r} is missing from the files; copy the whole folder again")
        info = facts.checkpoint.info(name)
        if info.shape != shape or (info.dtype != dtype if dtype else info.dtype not in _PLAIN):
            kind = dtype or "a float type"
            raise PaleyError(f"{info.file}: {name} is {info.dtype} {info.shape}, must be {kind} {shape}")
    carried = set(facts.spec.carried)
    if extra := [name for name in facts.checkpoint if name not in wanted and name not in carried]:
        raise PaleyError(f"{folder}: tensor {extra[0]!r} is in the files, but not in the model")
    for name, scheme in facts.spec.linears.items():
        if scheme.weight is not None:
            found = {name + part: tensors[name + part] for part in PARTS if name + part in tensors}
            try:
                check_values(name, found, _width(facts, name), scheme.weight.grid)
            except PaleyError as error:
                raise PaleyError(f"{folder}: {error}") from None
        if scheme.diagonal and not bool((tensors[name + DIAGONAL] > 0).all()):
            raise PaleyError(f"{folder}: {name + DIAGONAL} must be positive; the file is damaged")
    for name in wanted:
        if name in tensors and (tensor := tensors[name]).is_floating_point() and not _finite(tensor):
            raise PaleyError(f"{folder}: {name} holds a number that is not finite; the file is damaged")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all()) if tensor.numel() else True


def scheme_of(facts: Facts, name: str) -> LinearScheme:
    """Of a linear, embedding or head; that of a tied head is the embedding's."""
    site = facts.sites[name]
    return facts.spec.linears.get(site.stored_as, LinearScheme())


def error_of_blocks(facts: Facts) -> float:
    """Relative error, rms, of the weights in the blocks, as far as their grids tell it."""
    error = total = 0.0
    for site in facts.sites.of("linear"):
        scheme = scheme_of(facts, site.name).weight
        if scheme is not None:
            error += site.numel * (4.0**-scheme.grid.bits if isinstance(scheme.grid, FreeGrid) else scheme.grid.mse)
        total += site.numel
    return math.sqrt(error / total) if total else 0.0


def _width(facts: Facts, name: str) -> int:
    """Columns of a weight, as stored."""
    return scheme_of(facts, name).stored_width(plain_shape(facts, name)[1])


def plain_shape(facts: Facts, name: str) -> tuple[int, int]:
    """[out, in] of a weight as the model has it: of a tied pair beside a turned stream, that of the original."""
    rows, columns = facts.sites[name].shape
    if facts.spec.stream is not None and facts.sites.tied and facts.sites[name].kind != "linear":
        columns = facts.spec.stream.in_dim
    return rows, columns


def _expected(facts: Facts) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Name -> (dtype, or None for any floats, and shape) of each tensor of the model; biases may be missing."""
    row, found = facts.row, dict[str, tuple[torch.dtype | None, tuple[int, ...]]]()
    for site in facts.sites.weights:
        found |= expected_tensors(site.name, scheme_of(facts, site.name), _width(facts, site.name), site.shape[0])
        if site.kind == "linear":
            found[site.name + BIAS] = (None, (site.shape[0],))
    width = facts.config.hidden_size
    for block in range(facts.sites.blocks):
        for norm in row.norms():
            size = width if not norm.over_heads else facts.head_dim
            size = row.sizes(facts.config)[norm.reads] if norm.whole else size
            found[f"{row.blocks}.{block}.{norm.path}{WEIGHT}"] = (None, (size,))
    found[row.norm + WEIGHT] = (None, (plain_shape(facts, row.head)[1],))
    heads = facts.config.num_key_value_heads, facts.head_dim
    for name, scheme in facts.spec.attentions.items():
        if scheme.mean_keys == 2:
            found[f"{name}.key_offset"] = (torch.float16, (2, *heads))
        elif scheme.mean_keys == 1:
            found[f"{name}.key_mean"] = (torch.float16, heads)
    return found


def coded_weight(facts: Facts, tensors: Mapped, name: str) -> Quantized:
    """The codes of a weight, unpacked."""
    return decode_linear(facts.sites[name].stored_as, tensors, scheme_of(facts, name), _width(facts, name))


def stored_weight(facts: Facts, tensors: Mapped, name: str) -> StoredWeight:
    """The codes of a weight as the file has them; `check_tensors` must have passed."""
    stored, scheme = facts.sites[name].stored_as, scheme_of(facts, name)
    assert scheme.weight is not None
    outliers = None
    if scheme.outliers:
        outliers = Outliers(*(tensors[stored + part] for part in (OUTLIER_COLUMNS, OUTLIERS, OUTLIER_SCALES)))
    zeros = tensors[stored + ZEROS] if scheme.weight.grid.affine else None
    codes, scales = tensors[stored + CODES], tensors[stored + SCALES]
    return StoredWeight(stored, codes, scales, zeros, scheme.weight.grid, _width(facts, name), outliers)


def dense_weight(facts: Facts, tensors: Mapped, name: str) -> tuple[Tensor, bool]:
    """A weight that no kernel takes as codes, [out, columns] in a plain type; and whether its transform is undone.

    It is undone if the input is not rounded, and then columns are those of the model.
    """
    site, scheme = facts.sites[name], scheme_of(facts, name)
    if scheme.weight is None:
        weight, undone = tensors[site.stored_as + WEIGHT], False
        if scheme.input is not None or scheme.transform is None:
            return weight, undone
        weight = weight.float()
    else:
        weight = coded_weight(facts, tensors, name).dequantize()
    if scheme.input is not None or scheme.transform is None:
        return weight.contiguous(), False
    weight = scheme.transform.adjoint(weight)
    if scheme.diagonal:
        weight = weight / tensors[site.stored_as + DIAGONAL].float()
    return weight.contiguous(), True


def floats(tensors: Mapping[str, Tensor] | Mapped, name: str) -> Tensor:
    """A tensor as contiguous float32."""
    found: Any = tensors[name]
    return found.float().contiguous()
