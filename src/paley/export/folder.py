"""What every export begins with: a quantized folder that is as it was written, and what it does at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from paley.core.errors import PaleyError, Setting
from paley.format import digests, spec
from paley.format.checkpoint import Checkpoint
from paley.format.publish import Work
from paley.model.checks import check_layers

__all__ = ["Exported", "QuantizedFolder", "place_for"]


@dataclass(frozen=True)
class Exported:
    """Where the new folder is, what it does not do any more, and bytes of all tensors before and after.

    leftover: what is still there of an older output that it replaced, as the system does not delete it. types: of the
    format's own types of tensors, how many there are. notes: what is not exactly as it was.
    """

    output: Path
    dropped: tuple[str, ...]
    quantized_bytes: int
    bytes: int
    leftover: tuple[Path, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedFolder:
    """A checked folder. dropped: what it does while it runs, which is to be left out."""

    path: Path
    stored: Checkpoint
    section: spec.QuantizationConfig
    dropped: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, *, weights_only: bool, what: str) -> Self:
        """what: the output, as errors call it, such as "an ordinary checkpoint".

        Errors: PaleyError for a folder that is damaged or none of ours, and, unless weights_only, for one that does
        at run time what the output cannot.
        """
        stored = Checkpoint.open(path)
        section = spec.quantization_of(stored)
        digests.check(stored)
        check_layers(path / "config.json", stored.config, stored.names)
        rounded, left_out = _rounded_at_run_time(section), _left_out(section)
        if (rounded or left_out) and not weights_only:
            cannot = "round what this model rounds" if rounded else "leave out what this model leaves out"
            raise PaleyError(
                f"{what} cannot {cannot} as it runs: {'; '.join([*rounded, *left_out])}",
                where=path,
                remedy=(Setting("weights_only", True), " leaves that out, and keeps the weights"),
            )
        return cls(path, stored, section, (*(f"rounding of {what}" for what in rounded), *left_out))

    @property
    def grids(self) -> str:
        """'uint4 × 210, int8 × 1': the weights' grids, and on how many."""
        slots = self.section.linears.values()
        found = Counter("16 bits" if slot.weight is None else slot.weight.grid.name for slot in slots)
        return ", ".join(f"{grid} × {count}" for grid, count in found.items())


def place_for(output: Path, folder: Path, *, overwrite: bool) -> Work:
    """The place of a new folder; PaleyError unless it is free, and apart from the quantized one."""
    place = Work(output)
    place.check_apart(folder)
    if place.output.is_relative_to(folder.resolve()):
        raise PaleyError(f"{output}: lies in the model's own folder; choose another --output")
    place.check_free(overwrite=overwrite)
    return place


def _rounded_at_run_time(section: spec.QuantizationConfig) -> list[str]:
    """What is rounded while the model runs, summed up: '14 linear inputs to int4'."""
    found = Counter(f"linear inputs to {slot.input.grid.name}" for slot in section.linears.values() if slot.input)
    for what in ("keys", "values"):
        schemes = (getattr(slot, what) for slot in section.attentions.values())
        found.update(f"layers' cached {what} to {scheme.grid.name}" for scheme in schemes if scheme)
    return [f"{count} {what}" for what, count in found.items()]


def _left_out(section: spec.QuantizationConfig) -> list[str]:
    """What the final norm of a tied pair does not see of a widened stream: an untied one's sees all of it."""
    stream = section.stream
    if stream is None or stream.out_dim == stream.in_dim:
        return []
    return [f"errors outside of {stream.in_dim} of the stream's {stream.out_dim} directions, in the final norm"]
