"""`paley dequantize`: a quantized folder becomes an ordinary checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, peak_memory, say, shell

__all__ = ["dequantize_verb"]


@verb("dequantize")
def dequantize_verb(
    folder: options.Folder,
    output: options.NewFolder,
    weights_only: options.WeightsOnly = False,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a quantized folder as an ordinary checkpoint, which loads without Paley.

    Weights are decoded, rotations of the layers' inputs undone; the file grows to 16 bits a weight again.
    A model that rounds inputs, keys or values as it runs is refused: --weights-only leaves that out.

    Example: `paley dequantize llama-w4 --output llama-plain`
    """
    from paley.cli import display
    from paley.cli.progress import counting

    start = time.monotonic()
    with counting("decoding") as on_tensor:
        made = paley.dequantize(
            folder, output=output, weights_only=weights_only, dtype=dtype, overwrite=overwrite, on_tensor=on_tensor
        )
    cost = display.Cost(time.monotonic() - start, peak_memory())
    for path in made.leftover:
        say(f"warning: {path}: cannot be deleted; delete it yourself")
    if as_json:
        paths = {"output": str(made.output), "leftover": [str(path) for path in made.leftover]}
        display.emit(asdict(made) | asdict(cost) | paths)
        return
    rows = [("bytes on disk", f"{made.quantized_bytes:,}", f"{made.bytes:,}"), *cost.rows()]
    display.show(display.table(("", "quantized", "plain"), rows))
    for what in made.dropped:
        line(f"dropped: {what}")
    line(f"written to {made.output}")
    line(f"next: {shell('generate', str(made.output), 'Once upon a time')}")
