"""`paley export`: a quantized folder in another tool's format."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, peak_memory, say

__all__ = ["export_verb"]

To = Annotated[
    str,
    typer.Option("--to", metavar="FORMAT", help="gguf, compressed-tensors, mlx, plain (16 bits).", show_default=False),
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type", metavar="TYPE", help="Of gguf: round weights anew to Q4_K, Q6_K or Q8_0, whatever they are on."
    ),
]


@verb("export")
def export_verb(
    folder: options.Folder,
    to: To,
    output: options.NewFolder,
    kind: Type = None,
    weights_only: options.WeightsOnly = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a quantized folder in another tool's format.

    The very codes and scales: gguf for llama.cpp (quantize with a preset such as gguf-q4_0), compressed-tensors for
    transformers and vLLM (ct-w4g128), mlx for Apple's (mlx-4). plain: an ordinary checkpoint, as `paley dequantize`
    writes. What a format cannot hold is refused, but --type makes a gguf file of any folder, and tells the loss.

    Example: `paley export llama-q4_0 --to gguf --output llama-gguf`
    """
    from paley.cli import display
    from paley.cli.progress import counting

    start = time.monotonic()
    with counting("writing") as on_tensor:
        made = paley.export_to(
            folder, to, output=output, kind=kind, weights_only=weights_only, overwrite=overwrite, on_tensor=on_tensor
        )
    cost = display.Cost(time.monotonic() - start, peak_memory())
    for path in made.leftover:
        say(f"warning: {path}: cannot be deleted; delete it yourself")
    if as_json:
        paths = {"output": str(made.output), "leftover": [str(path) for path in made.leftover]}
        display.emit(asdict(made) | asdict(cost) | paths)
        return
    rows = [("bytes of tensors", f"{made.quantized_bytes:,}", f"{made.bytes:,}"), *cost.rows()]
    display.show(display.table(("", "quantized", to), rows))
    if made.types:
        line("tensors: " + ", ".join(f"{kind} × {count}" for kind, count in made.types.items()))
    for what in made.dropped:
        line(f"dropped: {what}")
    for what in made.notes:
        line(f"not exact: {what}")
    line(f"written to {made.output}")
