"""GGUF of any folder: its weights are decoded and rounded anew to one of ggml's types, and what that loses is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.arch import Site, Sites
from paley.core.errors import PaleyError, Setting, nearest_name
from paley.export.k_quants import fit_q4_k, fit_q6_k
from paley.export.plain import dequantize

__all__ = ["KINDS", "Refit", "WrittenTensor", "check_kind", "decoded"]

# Type -> that of rows which no superblock divides, as in llama.cpp's quantizer, and that of embedding and head.
KINDS = {"Q4_K": ("Q5_0", "Q6_K"), "Q6_K": ("Q8_0", "Q6_K"), "Q8_0": ("Q8_0", "Q8_0")}
_FITS = {"Q4_K": fit_q4_k, "Q6_K": fit_q6_k}
_AT_ONCE = 2**20  # values fitted together


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the file: shape in rows and columns, ggml's type, and what makes its bytes, uint8 [rows, bytes]."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], Tensor]
    nbytes: int


@dataclass
class Refit:
    """losses: of each weight so far, |W - W'|^2 / |W|^2 of what the folder holds and what the file does."""

    package: Any
    kind: str
    losses: dict[str, float] = field(default_factory=dict)

    def tensor(
        self, name: str, part: str, site: Site, read: Callable[[], Tensor], order: Tensor | None
    ) -> WrittenTensor:  # fmt: skip
        """read() -> the weight [rows, columns]; order: which of its rows the file has. part: what losses call it."""
        rows, columns = site.shape
        rows = rows if order is None else len(order)
        shape = (site.experts, rows // site.experts, columns) if site.experts else (rows, columns)
        kind, block, size = self._type(site)
        return WrittenTensor(
            name, shape, kind, partial(self._data, part, read, order, kind), rows * columns // block * size
        )

    def check(self, sites: Sites) -> None:
        """Raises for a weight that no type holds, before anything is decoded."""
        for site in sites.weights:
            self._type(site)

    def notes(self) -> list[str]:
        if not self.losses:
            return []
        name, most = max(self.losses.items(), key=lambda item: item[1])
        mean = sum(self.losses.values()) / len(self.losses)
        return [f"{len(self.losses)} weights are rounded anew: |W - W'|^2 / |W|^2 is {mean:.2e} on average, and "
                f"{most:.2e} in {name}"]  # fmt: skip

    def _type(self, site: Site) -> tuple[str, int, int]:
        """ggml's type of a weight, and values and bytes of a block."""
        columns, wanted = site.shape[1], self.kind if site.kind == "linear" else KINDS[self.kind][1]
        kind = wanted if columns % self._size(wanted)[0] == 0 else KINDS[wanted][0]
        block, size = self._size(kind)
        if columns % block:
            raise PaleyError(
                f"{site.name}: no type of GGUF that {self.kind} stands for has rows of {columns} values; the blocks of "
                f"{kind} have {block}",
                remedy="export it --to plain",
            )
        return kind, block, size

    def _size(self, kind: str) -> tuple[int, int]:
        """Values and bytes of a block."""
        return self.package.GGML_QUANT_SIZES[self.package.GGMLQuantizationType[kind]]

    def _data(self, part: str, read: Callable[[], Tensor], order: Tensor | None, kind: str) -> Tensor:
        weight = read().float()
        weight = weight if order is None else weight[order]
        number, parts = self.package.GGMLQuantizationType[kind], []
        lost = total = 0.0
        for some in weight.split(max(1, _AT_ONCE // weight.shape[1])):
            made = _FITS[kind](some) if kind in _FITS else torch.from_numpy(self.package.quantize(some.numpy(), number))
            back = torch.from_numpy(self.package.dequantize(made.numpy(), number))
            lost += float((back - some).double().square().sum())
            total += float(some.double().square().sum())
            parts.append(made)
        self.losses[part] = lost / total if total else 0.0
        return torch.cat(parts)


def check_kind(kind: str) -> None:
    """Raises for a type to which nothing is rounded."""
    if kind not in KINDS:
        known = (
            f": must be {', '.join(KINDS)}, to which weights are rounded anew; without it the very codes are written"
        )
        raise PaleyError(Setting("kind"), known, got=f"{kind!r}{nearest_name(kind, KINDS)}")


def decoded(folder: Path, plain: Path, *, weights_only: bool) -> Path:
    """An ordinary checkpoint of the folder in float32, at `plain`."""
    return dequantize(folder, output=plain, dtype="float32", weights_only=weights_only).output
