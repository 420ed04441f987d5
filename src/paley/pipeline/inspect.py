"""`paley.inspect`: what a quantized folder holds, layer by layer, without loading the model."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from paley.core import packing
from paley.core.grids import as_fixed
from paley.core.schemes import AttentionScheme, LinearScheme
from paley.format.checkpoint import Checkpoint
from paley.format.spec import CODES, DIAGONAL, PARTS, SCALES, WEIGHT, quantization_of
from paley.methods.nearest import gaussian_error, gaussian_spread
from paley.results import Results

__all__ = ["InspectedLinear", "Inspection", "inspect"]

_VECTORS = "norms and biases"
_OFF, _BY_CHANCE = 0.03, 3  # beyond that part, and so many standard errors, an error is not that of Gaussian weights


@dataclass(frozen=True)
class InspectedLinear:
    """A linear layer; bytes are those of its weight: codes, scales, zeros.

    rel_error was measured as it was quantized, None if that is not known, or if its scales were tuned since.
    gaussian_error: what Gaussian weights would have, and gaussian_spread: one standard error of it by chance, as a part
    of it; None if the grid is not for them, or GPTQ chose the codes.
    """

    scheme: LinearScheme
    bytes: int
    rel_error: float | None
    gaussian_error: float | None
    gaussian_spread: float | None

    @property
    def excess(self) -> float | None:
        """By what part the error is above (or below) that of Gaussian weights; None within chance."""
        if self.rel_error is None or self.gaussian_error is None or self.gaussian_spread is None:
            return None
        off = self.rel_error / self.gaussian_error - 1
        return off if abs(off) > max(_OFF, _BY_CHANCE * self.gaussian_spread) else None


@dataclass(frozen=True)
class Inspection:
    """linears and attentions by module name; untouched_bytes: of each tensor that no quantizer took.

    bytes: of all tensors. results: what the run measured, None if it is not there or of an older Paley.
    """

    folder: Path
    model_type: str | None
    linears: dict[str, InspectedLinear]
    attentions: dict[str, AttentionScheme]
    untouched_bytes: dict[str, int]
    bytes: int
    results: Results | None

    @property
    def tuned(self) -> list[str]:
        """The layers whose scales were tuned after rounding, which nobody measured the error of since."""
        layers = {} if self.results is None else self.results.layers
        return [name for name, layer in layers.items() if layer.rel_error is None]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        linears = {
            name: _plain(linear.scheme)
            | {"rel_error": linear.rel_error, "gaussian_error": linear.gaussian_error, "bytes": linear.bytes}
            for name, linear in self.linears.items()
        }
        results = {} if self.results is None else self.results.to_dict()
        return {
            "folder": str(self.folder),
            "model_type": self.model_type,
            "linears": linears,
            "attentions": {name: _plain(scheme) for name, scheme in self.attentions.items()},
            "untouched_bytes": self.untouched_bytes,
            "bytes": self.bytes,
            **{key: results.get(key) for key in ("original_bytes", "bits_per_weight", "evaluation")},
        }


def inspect(folder: str | Path) -> Inspection:
    """Reads headers and JSON files only; PaleyError for a folder that is not ours, or damaged."""
    checkpoint = Checkpoint.open(Path(folder))
    config = quantization_of(checkpoint)
    results = Results.beside(checkpoint.folder)
    errors = {} if results is None else {name: layer.rel_error for name, layer in results.layers.items()}
    return Inspection(
        folder=checkpoint.folder,
        model_type=checkpoint.config.get("model_type"),
        linears={name: _linear(checkpoint, name, scheme, errors.get(name)) for name, scheme in config.linears.items()},
        attentions=dict(config.attentions),
        untouched_bytes=_untouched(checkpoint, config.linears),
        bytes=checkpoint.nbytes,
        results=results,
    )


def _linear(checkpoint: Checkpoint, name: str, scheme: LinearScheme, rel_error: float | None) -> InspectedLinear:
    nbytes = sum(checkpoint.info(part).nbytes for part in _stored(checkpoint, name))
    error, spread = _gaussian(checkpoint, name, scheme)
    return InspectedLinear(scheme, nbytes, rel_error, error, spread)


def _gaussian(checkpoint: Checkpoint, name: str, scheme: LinearScheme) -> tuple[float | None, float | None]:
    """The error that Gaussian weights would have, and its standard error over this many values, relative to it."""
    if (made := scheme.weight) is None or made.method != "nearest" or made.scale_search not in ("rms", "unbiased"):
        return None, None
    if not made.grid.gaussian:
        return None, None
    rows, stored = checkpoint.shape(name + CODES)
    if made.group_size is None:  # a row has one scale: as many columns as its codes have room for
        width = int(8 * stored / packing.stored_bits(made.grid))
        made = replace(made, group_size=width)
    else:
        width = made.group_size * checkpoint.shape(name + SCALES)[1]
    return gaussian_error(made, width), gaussian_spread(as_fixed(made.grid)) / (rows * width) ** 0.5


def _untouched(checkpoint: Checkpoint, linears: dict[str, LinearScheme]) -> dict[str, int]:
    """Name -> bytes of each tensor that no quantizer took; vectors are summed up as one entry."""
    taken = {stored for name in linears for stored in _stored(checkpoint, name)}
    left = {n: info for n, info in checkpoint.infos.items() if n not in taken}
    found = {name: info.nbytes for name, info in left.items() if len(info.shape) > 1}
    if vectors := sum(info.nbytes for info in left.values() if len(info.shape) <= 1):
        found[_VECTORS] = vectors
    return found


def _stored(checkpoint: Checkpoint, name: str) -> list[str]:
    """The tensors of a linear's weight: its codes and what belongs to them, or floats."""
    return [n for part in (*PARTS, DIAGONAL) if (n := name + part) in checkpoint] or [name + WEIGHT]


def _plain(part: Any) -> dict[str, Any]:
    """A scheme as plain data, its grid by name."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {k: v.name if k == "grid" else _plain(v) if is_dataclass(v) else v for k, v in values.items()}
