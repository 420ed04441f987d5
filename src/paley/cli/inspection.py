"""What a quantized folder holds: schemes, errors and bytes of each slot, without loading the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paley.cli.display import Row, clip, scheme, scores, show, table
from paley.cli.process import line
from paley.core import grids, packing
from paley.core.grids import FreeGrid
from paley.format.checkpoint import Checkpoint
from paley.format.files import read_json
from paley.format.spec import CODES, PARTS, SCALES, WEIGHT, QuantizationConfig, quantization_of
from paley.methods.nearest import gaussian_error, gaussian_spread

__all__ = ["Inspection"]

_VECTORS = "norms and biases"
_REL_ERROR = (
    "rel_error: ‖W − Ŵ‖² / ‖W‖² against the rotated weight, not an output error; o_proj and down_proj also make up "
    "for the layers before them, and can exceed 1"
)
_OFF, _BY_CHANCE = 0.03, 3  # beyond that part, and so many standard errors, an error is not that of Gaussian weights
_LISTED = 8


@dataclass(frozen=True)
class Inspection:
    """`results`: results.json, empty where the folder came without it."""

    checkpoint: Checkpoint
    config: QuantizationConfig
    results: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Inspection:
        """Reads headers and JSON files only; PaleyError for a folder that is not ours, or damaged."""
        checkpoint = Checkpoint.open(folder)
        config = quantization_of(checkpoint)
        results = folder / "results.json"
        return cls(checkpoint, config, read_json(results) if results.exists() else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data; bytes of a linear are those of its weight: codes, scales, zeros."""
        linears = {
            name: asdict(slot)
            | {"rel_error": self.rel_error(name), "gaussian_error": self.gaussian_error(name)}
            | {"bytes": self.nbytes(name)}
            for name, slot in self.config.linears.items()
        }
        return {
            "folder": str(self.checkpoint.folder),
            "model_type": self.checkpoint.config.get("model_type"),
            "linears": linears,
            "attentions": {name: asdict(slot) for name, slot in self.config.attentions.items()},
            "untouched_bytes": self.untouched(),
            "bytes": self.checkpoint.nbytes,
            **{key: self.results.get(key) for key in ("original_bytes", "bits_per_weight", "evaluation")},
        }

    def show(self) -> None:
        """Tables on stdout: linear layers, caches, what was left alone, totals."""
        header = ("linear layer", "weight", "input", "clip", "rel_error", "bytes")
        show(table(header, self._linear_rows(), left=3))
        line(_REL_ERROR)
        for said in self.not_gaussian():
            line(said)
        caches = [
            (name, scheme(slot.keys), clip(slot.keys), scheme(slot.values), clip(slot.values))
            for name, slot in self.config.attentions.items()
            if slot.keys or slot.values
        ]
        if caches:
            show(table(("cache of", "keys", "clip", "values", "clip"), caches, left=2))
        left = [(name, f"{nbytes:,}") for name, nbytes in self.untouched().items()]
        show(table(("left unquantized", "bytes"), left))
        show(table(("", ""), self._totals()))
        if not caches:
            line("keys and values are cached in 16 bits")
        if not self.results:
            line("no results.json in this folder: measured errors and scores are not known")

    def rel_error(self, name: str) -> float | None:
        """The measured error of a linear's weight, relative; None where none was recorded."""
        return self.results.get("layers", {}).get(name, {}).get("rel_error")

    def gaussian_error(self, name: str) -> float | None:
        """The error that Gaussian weights would have; None where the grid is not for them, or GPTQ chose codes."""
        slot = self.config.linears[name]
        if (made := slot.weight) is None or made.method != "nearest" or made.scale_search not in ("rms", "unbiased"):
            return None
        grid = grids.load(made.grid)
        if isinstance(grid, FreeGrid) or not (grid.unit or grid.name.startswith("gauss")):
            return None
        width, whole = self._width(name), made.group_size is None
        return gaussian_error(replace(made, group_size=width if whole else made.group_size), width)

    def not_gaussian(self) -> list[str]:
        """A line for each layer whose error is beyond chance not that of Gaussian weights, worst first."""
        found = []
        for name, slot in self.config.linears.items():
            error, expected = self.rel_error(name), self.gaussian_error(name)
            if error is None or expected is None or slot.weight is None:
                continue
            off = error / expected - 1
            values = self.checkpoint.shape(name + CODES)[0] * self._width(name)
            if abs(off) > max(_OFF, _BY_CHANCE * gaussian_spread(slot.weight.grid) / values**0.5):
                found.append((abs(off), f"{name}, error {abs(off):.0%} {'above' if off > 0 else 'below'} its grid's"))
        lines = [f"not Gaussian: {said}" for _, said in sorted(found, key=lambda entry: -entry[0])]
        if (more := len(lines) - _LISTED) > 0:
            lines[_LISTED:] = [f"not Gaussian: {more} more; --json has the gaussian_error of each layer"]
        return lines

    def _width(self, name: str) -> int:
        """Columns of a quantized weight; where a row has one scale, as many as its codes have room for."""
        made = self.config.linears[name].weight
        assert made is not None
        if made.group_size is not None:
            return made.group_size * self.checkpoint.shape(name + SCALES)[1]
        return int(8 * self.checkpoint.shape(name + CODES)[1] / packing.stored_bits(grids.load(made.grid)))

    def nbytes(self, name: str) -> int:
        """Stored bytes of a linear's weight."""
        return sum(self.checkpoint.info(n).nbytes for n in self._stored(name) or [name + WEIGHT])

    def untouched(self) -> dict[str, int]:
        """Name -> bytes of each tensor that no quantizer took; vectors are summed up as one entry."""
        taken = {stored for name in self.config.linears for stored in self._stored(name)}
        left = {n: info for n, info in self.checkpoint.infos.items() if n not in taken}
        found = {name: info.nbytes for name, info in left.items() if len(info.shape) > 1}
        if vectors := sum(info.nbytes for info in left.values() if len(info.shape) <= 1):
            found[_VECTORS] = vectors
        return found

    def _stored(self, name: str) -> list[str]:
        return [n for part in PARTS if (n := name + part) in self.checkpoint]

    def _linear_rows(self) -> list[Row]:
        rows = []
        for name, slot in self.config.linears.items():
            error = self.rel_error(name)
            numbers = (clip(slot.input), "" if error is None else f"{error:.4f}", f"{self.nbytes(name):,}")
            rows.append((name, scheme(slot.weight, slot.outliers), scheme(slot.input), *numbers))
        return rows

    def _totals(self) -> list[Row]:
        quantized = self.checkpoint.nbytes - sum(self.untouched().values())
        rows: list[Row] = [
            ("bytes of quantized weights", f"{quantized:,}"),
            ("bytes on disk, all tensors", f"{self.checkpoint.nbytes:,}"),
        ]
        results = self.results
        if results:
            rows.append(("bytes of the original", f"{results['original_bytes']:,}"))
            rows.append(("bits per weight, every byte counted", f"{results['bits_per_weight']:.3f}"))
            if (layers := results.get("bits_per_quantized_weight")) is not None:
                rows.append(("bits per weight, quantized layers", f"{layers:.3f}"))
            rows += [(what, here) for what, _, here in scores(results["evaluation"] or {})]
        return rows
