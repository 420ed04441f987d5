"""What a quantized folder holds: schemes, errors and bytes of each slot, without loading the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paley.cli.display import Row, clip, line, scheme, scores, show, table
from paley.format.checkpoint import Checkpoint
from paley.format.files import read_json
from paley.format.spec import PARTS, WEIGHT, QuantizationConfig, quantization_of

__all__ = ["Inspection"]

_VECTORS = "norms and biases"
_REL_ERROR = (
    "rel_error: ‖W − Ŵ‖² / ‖W‖² against the rotated weight, not an output error; o_proj and down_proj also make up "
    "for the layers before them, and can exceed 1"
)


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
            name: asdict(slot) | {"rel_error": self.rel_error(name), "bytes": self.nbytes(name)}
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
