"""The formats that a quantized folder can be exported to, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from paley.core.errors import PaleyError, Setting, nearest_name
from paley.export.compressed_tensors import export_compressed_tensors
from paley.export.folder import Exported
from paley.export.gguf import export_gguf
from paley.export.mlx import export_mlx
from paley.export.plain import dequantize

__all__ = ["FORMATS", "export_to"]


class Exporter(Protocol):
    """Writes a quantized folder in one format to a new folder."""

    def __call__(
        self, path: str | Path, *, output: str | Path, weights_only: bool = False, overwrite: bool = False,
        on_tensor: Callable[[int, str], None] = lambda total, name: None,
    ) -> Exported: ...  # fmt: skip


FORMATS: dict[str, Exporter] = {
    "gguf": export_gguf, "compressed-tensors": export_compressed_tensors, "mlx": export_mlx, "plain": dequantize,
}  # fmt: skip


def export_to(
    path: str | Path,
    to: str,
    *,
    output: str | Path,
    kind: str | None = None,
    weights_only: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` in the format `to`, one of FORMATS, to the new folder `output`.

    kind: of gguf alone, a type to which weights are rounded anew: Q4_K, Q6_K or Q8_0. weights_only: leave out the
    rounding of linear inputs, keys and values, which other formats cannot say. on_tensor hears of each tensor written,
    and how many there are. Errors: PaleyError, with nothing in `output`.
    """
    if to not in FORMATS:
        known = f": must be {', '.join(FORMATS)}"
        raise PaleyError(Setting("to"), known, got=f"{to!r}{nearest_name(to, FORMATS)}")
    if kind is not None:
        if to != "gguf":
            raise PaleyError(Setting("kind"), " is a type of gguf's; leave it out", got=repr(kind))
        return export_gguf(
            path, output=output, kind=kind.upper(), weights_only=weights_only, overwrite=overwrite, on_tensor=on_tensor
        )
    return FORMATS[to](path, output=output, weights_only=weights_only, overwrite=overwrite, on_tensor=on_tensor)
