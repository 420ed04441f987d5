"""`paley inspect`: shows what a quantized folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line

if TYPE_CHECKING:
    from paley.cli.display import Row
    from paley.pipeline.inspect import InspectedLinear, Inspection

__all__ = ["inspect_verb"]

_REL_ERROR = (
    "rel_error: ‖W − Ŵ‖² / ‖W‖² against the rotated weight, not an output error; o_proj and down_proj also make up "
    "for the layers before them, and can exceed 1"
)
_LISTED = 8


@verb("inspect", reads=True)
def inspect_verb(folder: options.Folder, as_json: options.Json = False) -> None:
    """Show what a quantized folder holds: scheme, clip ratio, measured error and bytes of each layer.

    rel_error is ‖W − Ŵ‖² / ‖W‖² of a layer's rotated weight W and its quantized Ŵ, not an error of its output.
    It can exceed 1 in o_proj and down_proj, which also make up for the errors of the layers before them.

    Only headers are read, so a large model takes no longer than a small one.

    Example: `paley inspect llama-w4`
    """
    from paley.cli import display

    inspection = paley.inspect(folder)
    if as_json:
        display.emit(inspection.to_dict())
    else:
        _show(inspection)


def _show(inspection: Inspection) -> None:
    """Tables on stdout: linear layers, caches, what was left alone, totals."""
    from paley.cli.display import clip, scheme, show, table

    header = ("linear layer", "weight", "input", "clip", "rel_error", "bytes")
    tuned = set(inspection.tuned)
    rows = [_linear_row(name, linear, tuned=name in tuned) for name, linear in inspection.linears.items()]
    show(table(header, rows, left=3))
    line(_REL_ERROR)
    if tuned:
        line(f"tuned: {len(tuned)} layers, whose scales moved after rounding and have no rel_error since")
    for text in _not_gaussian(inspection):
        line(text)
    caches = [
        (name, scheme(slot.keys), clip(slot.keys), scheme(slot.values), clip(slot.values))
        for name, slot in inspection.attentions.items()
        if slot.keys or slot.values
    ]
    if caches:
        show(table(("cache of", "keys", "clip", "values", "clip"), caches, left=2))
    left = [(name, f"{nbytes:,}") for name, nbytes in inspection.untouched_bytes.items()]
    show(table(("left unquantized", "bytes"), left))
    show(table(("", ""), _totals(inspection)))
    if not caches:
        line("keys and values are cached in 16 bits")
    if inspection.results is None:
        made = "is of an older Paley" if (inspection.folder / "results.json").exists() else "is not in this folder"
        line(f"results.json {made}: measured errors and scores are not known")


def _linear_row(name: str, linear: InspectedLinear, *, tuned: bool) -> Row:
    from paley.cli.display import clip, scheme

    slot, error = linear.scheme, linear.rel_error
    shown = "tuned" if tuned else "" if error is None else f"{error:.4f}"
    numbers = (clip(slot.input), shown, f"{linear.bytes:,}")
    return (name, scheme(slot.weight, slot.outliers), scheme(slot.input), *numbers)


def _not_gaussian(inspection: Inspection) -> list[str]:
    """A line for each layer whose error is beyond chance not that of Gaussian weights, worst first."""
    found = [(off, name) for name, linear in inspection.linears.items() if (off := linear.excess) is not None]
    lines = [
        f"not Gaussian: {name}, error {abs(off):.0%} {'above' if off > 0 else 'below'} its grid's"
        for off, name in sorted(found, key=lambda entry: -abs(entry[0]))
    ]
    if (more := len(lines) - _LISTED) > 0:
        lines[_LISTED:] = [f"not Gaussian: {more} more; --json has the gaussian_error of each layer"]
    return lines


def _totals(inspection: Inspection) -> list[Row]:
    from paley.cli.display import scores

    quantized = inspection.bytes - sum(inspection.untouched_bytes.values())
    rows: list[Row] = [
        ("bytes of quantized weights", f"{quantized:,}"),
        ("bytes on disk, all tensors", f"{inspection.bytes:,}"),
    ]
    if (results := inspection.results) is not None:
        rows.append(("bytes of the original", f"{results.original_bytes:,}"))
        rows.append(("bits per weight, every byte counted", f"{results.bits_per_weight:.3f}"))
        if (layers := results.bits_per_quantized_weight) is not None:
            rows.append(("bits per weight, quantized layers", f"{layers:.3f}"))
        rows += [(what, here) for what, _, here in scores(results.evaluation)]
    return rows
