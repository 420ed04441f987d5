"""Weights that other tools store in FP8 or MXFP4, decoded as they are read, one at a time.

- FP8 (DeepSeek, Qwen; compressed-tensors; ModelOpt): NAME holds float8 values, NAME_scale_inv or NAME_scale what they
  are multiplied by: one factor for a tensor, for each row, or for each block of rows and columns.
- MXFP4 (gpt-oss; OCP Microscaling Formats 1.0): NAME_blocks holds two E2M1 codes a byte, the lower one first, and
  NAME_scales a power of two for every 32 of them. A stack of experts is stored [E, out, in] and used as [E, in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.format.checkpoint import first_not_finite
from paley.format.header import TensorInfo

__all__ = ["Decoded", "Float8", "Fp8", "Mxfp4", "as_stored", "decode"]

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_FACTORS = ("_scale_inv", "_scale")  # after the name of FP8 values
_BLOCKS, _SCALES = "_blocks", "_scales"  # after the name of an MXFP4 stack
_MX = 32  # values that share a scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scales of inputs and caches, which such a model rounds as it runs.
_RUN_TIME = re.compile(r"\.(input|activation|output|[qkv]|prob)_scale(_inv)?$")


@dataclass(frozen=True)
class Fp8(TensorInfo):
    """float32 [..., out, in]: float8 values times their factors, rounded once.

    block: of one factor. end: of the factors' name, after that of the values.
    """

    values: TensorInfo
    factors: TensorInfo
    block: tuple[int, int]
    end: str

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.factors.nbytes

    def read(self) -> Tensor:
        (rows, columns), values = self.block, self.values.read()
        grid = [-(-size // step) for size, step in zip(self.shape[-2:], self.block, strict=True)]
        factors = self.factors.read().float().reshape(*self.shape[:-2], *grid)
        found = torch.empty(self.shape)
        for i in range(grid[0]):
            part = slice(i * rows, (i + 1) * rows)
            wide = factors[..., i : i + 1, :].repeat_interleave(columns, -1)[..., : self.shape[-1]]
            torch.mul(values[..., part, :].float(), wide, out=found[..., part, :])
        return _finite(self, found)


@dataclass(frozen=True)
class Float8(TensorInfo):
    """float32, exact: float8 values without a scale."""

    values: TensorInfo

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> Tensor:
        return _finite(self, self.values.read().float())


@dataclass(frozen=True)
class Mxfp4(TensorInfo):
    """bfloat16 [E, in, out], exact: of a stack [E, out, in / 32, 16] of bytes and its scales [E, out, in / 32]."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes

    def read(self) -> Tensor:
        points = torch.tensor([*_E2M1, *(-x for x in _E2M1)])
        found = torch.empty(self.shape, dtype=torch.bfloat16)
        for expert, (codes, exponents) in enumerate(zip(self.blocks.read(), self.scales.read(), strict=True)):
            pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()  # [out, in / 32, 32]
            values = torch.ldexp(points[pairs], exponents[..., None].int() - 127)
            values[exponents == 255] = torch.nan
            found[expert] = values.flatten(-2).T
        return _finite(self, found)


@dataclass(frozen=True)
class Decoded:
    """infos: the tensors under the names that they are used by. kinds: how many of them are decoded, by the format.

    left_out: scales of inputs and caches.
    """

    infos: dict[str, TensorInfo]
    kinds: dict[str, int]
    left_out: list[str]


def as_stored(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """The tensors of a file that this one is decoded from, under their names; itself if it is not decoded."""
    if isinstance(info, Fp8):
        return {name: info.values, name + info.end: info.factors}
    if isinstance(info, Float8):
        return {name: info.values}
    if isinstance(info, Mxfp4):
        return {name + _BLOCKS: info.blocks, name + _SCALES: info.scales}
    return {name: info}


def decode(infos: Mapping[str, TensorInfo], block: tuple[int, int] | None) -> Decoded:
    """block: rows and columns of an FP8 factor, as the config has them; None: 128 by 128, if the shapes fit.

    Errors: PaleyError for scales that fit no weight.
    """
    found, kinds, taken = dict[str, TensorInfo](), dict[str, int](), set[str]()
    for name, info in infos.items():
        end = next((end for end in _FACTORS if name + end in infos), None)
        if info.dtype in FLOAT8 and end is not None:
            found[name] = _fp8(name, info, infos[name + end], block, end)
            kind, parts = "FP8", (name + end,)
        elif info.dtype in FLOAT8:
            found[name] = Float8(info.file, torch.float32, info.shape, info.start, info)
            kind, parts = "FP8 without scales", ()
        elif name.endswith(_BLOCKS) and (scales := name.removesuffix(_BLOCKS) + _SCALES) in infos:
            found[name.removesuffix(_BLOCKS)] = _mxfp4(name, info, infos[scales])
            kind, parts = "MXFP4", (name, scales)
        else:
            continue
        taken.update(parts)
        kinds[kind] = kinds.get(kind, 0) + 1
    left_out = [name for name in infos if kinds and name not in taken and _RUN_TIME.search(name)]
    others = {n: i for n, i in infos.items() if n not in found and n not in taken and n not in left_out}
    return Decoded(others | found, kinds, left_out)


def _fp8(name: str, values: TensorInfo, factors: TensorInfo, block: tuple[int, int] | None, end: str) -> Fp8:
    """Which factor belongs to which values, by the shapes: of blocks, of the whole matrix, or of each row."""
    if len(values.shape) < 2 or 0 in values.shape:
        raise PaleyError(f"{values.file}: {name} is FP8 of shape {list(values.shape)}; only matrices are decoded")
    *stack, rows, columns = values.shape
    for each in filter(None, (block, (rows, columns), (1, columns), (128, 128))):
        grid = (-(-rows // each[0]), -(-columns // each[1]))
        if _without_ones(factors.shape) == _without_ones((*stack, *grid)) and factors.dtype.is_floating_point:
            return Fp8(values.file, torch.float32, values.shape, values.start, values, factors, each, end)
    raise PaleyError(
        f"{factors.file}: the scales of {name} are {factors.dtype} {list(factors.shape)}, which fits no blocks of its "
        f"{list(values.shape)} values; get the checkpoint's original files"
    )


def _mxfp4(name: str, blocks: TensorInfo, scales: TensorInfo) -> Mxfp4:
    bytes_only = blocks.dtype == scales.dtype == torch.uint8
    if not bytes_only or blocks.shape != (*scales.shape, _MX // 2) or len(scales.shape) != 3:
        raise PaleyError(
            f"{blocks.file}: {name} is {blocks.dtype} {list(blocks.shape)}, its scales {scales.dtype} "
            f"{list(scales.shape)}; MXFP4 has bytes [experts, out, in / 32, 16] and [experts, out, in / 32]"
        )
    experts, rows, groups = scales.shape
    return Mxfp4(blocks.file, torch.bfloat16, (experts, groups * _MX, rows), blocks.start, blocks, scales)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _finite(source: TensorInfo, values: Tensor) -> Tensor:
    """-> values; raises if a scale makes one of them infinite or no number."""
    if (bad := first_not_finite(values)) is not None:
        raise PaleyError(f"{source.file}: a weight decodes to {bad[1]} at {list(bad[0])}; get a sound copy of the file")
    return values
