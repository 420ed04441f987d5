"""`paley doctor`: what this machine and this installation can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line

if TYPE_CHECKING:
    from paley.pipeline.doctor import Doctor

__all__ = ["doctor_verb"]


@verb("doctor")
def doctor_verb(folder: options.AnyFolder = None, as_json: options.Json = False) -> None:
    """Show the machine, its instruction sets and the native library, and test the kernels for a second.

    With a quantized folder: whether the native engine runs it, and by which product its layers are multiplied; if it
    does not, why. Exit code 1 if the library is missing or a test fails.

    Example: `paley doctor llama-w4`
    """
    from paley.cli import display

    found = paley.doctor(folder)
    if as_json:
        display.emit(found.to_dict())
    else:
        for text in _lines(found):
            line(text)
    if not found.well:
        raise typer.Exit(1)


def _lines(found: Doctor) -> list[str]:
    memory = "" if found.free_memory is None else f", {found.free_memory / 1e9:.1f} GB free"
    lines = [
        f"machine: {found.machine}, {found.cores} cores, {found.threads} threads{memory}",
        f"instructions: {' '.join(found.instructions) or 'none known'}",
        f"versions: {', '.join(f'{name} {version}' for name, version in found.versions.items())}",
    ]
    if found.missing is not None:
        lines.append(f"native library: none, the slower PyTorch code runs: {found.missing}")
    else:
        lines.append(f"native library: {found.library}")
        lines.append(f"levels: {', '.join(f'{name} {level}' for name, level in found.levels.items())}")
        lines += [f"test of {name}: {result}" for name, result in found.tests.items()]
    lines.append(f"Triton kernels: {found.gpu}")
    if found.engine is not None:
        how = "the native engine" if found.engine == "native" else f"transformers, as {found.engine}"
        lines.append(f"run by {how}")
    for product, count in (found.products or {}).items():
        lines.append(f"  {count} linears: {product}")
    return lines
