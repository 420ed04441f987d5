"""`paley inspect`: shows what a quantized folder holds."""

from __future__ import annotations

from paley.cli import options
from paley.cli.app import verb

__all__ = ["inspect_verb"]


@verb("inspect")
def inspect_verb(folder: options.Folder, as_json: options.Json = False) -> None:
    """Show what a quantized folder holds: scheme, clip ratio, measured error and bytes of each layer.

    rel_error is ‖W − Ŵ‖² / ‖W‖² of a layer's rotated weight W and its quantized Ŵ, not an error of its output.
    It can exceed 1 in o_proj and down_proj, which also make up for the errors of the layers before them.

    Only headers are read, so a large model takes no longer than a small one.

    Example: `paley inspect llama-w4`
    """
    from paley.cli import display
    from paley.cli.inspection import Inspection

    inspection = Inspection.of(folder)
    if as_json:
        display.emit(inspection.to_dict())
    else:
        inspection.show()
