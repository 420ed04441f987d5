"""`paley presets`: lists the packaged recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line

__all__ = ["presets_verb"]

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one's recipe.", show_default=False)]


@verb("presets")
def presets_verb(name: Name = None, as_json: options.Json = False) -> None:
    """List the packaged recipes, with size and loss on the demo model, and say how their names are read.

    A NAME that is none is answered by the nearest one.

    Example: `paley presets w4a16`
    """
    from paley.cli import display
    from paley.recipe import examples, preset
    from paley.recipe.presets import DEFAULT_METHOD, GRAMMAR, LISTED, measured
    from paley.recipe.saving import json_lines
    from paley.recipe.targets import TARGETS

    if name is not None:
        recipe = preset(name)
        if as_json:
            display.emit({"preset": name, "recipe": recipe.model_dump(mode="json")})
        else:
            line(json_lines(recipe.model_dump(mode="json"), 1))
        return
    figures = measured()
    if as_json:
        display.emit(
            {
                "grammar": GRAMMAR,
                "measured_on": {key: figures[key] for key in ("model", "settings", "original_bytes", "tokens")},
                "presets": [{"name": n, "what": what, **figures["presets"].get(n, {})} for n, what in LISTED.items()],
                "targets": {n: preset(n).model_dump(mode="json") for n in TARGETS},
                "methods": {n: preset(n).model_dump(mode="json") for n in examples()},
            }
        )
        return
    rows = []
    for each, what in LISTED.items():
        found = figures["presets"].get(each)
        shown = ("", "", "") if found is None else (
            f"{found['bytes'] / figures['original_bytes']:.2f}", f"{found['bits_per_weight']:.2f}", f"{found['kl']:.3f}"
        )  # fmt: skip
        rows.append((each, what, *shown))
    header = ("preset", "what is quantized", "size", "bits a weight", "KL")
    display.show(display.table(header, rows, left=2))
    line("size: of the original's, with embedding and head; KL: nats a token, on the demo model, 11.9 million")
    line("parameters. Models lose less the larger they are; `paley eval OUT --against MODEL` measures yours.")
    line()
    line(f"NAME = {GRAMMAR}")
    line("W, A and KV: bits of the weights, the linear layers' inputs and the KV cache; 16: unquantized.")
    line(f"G: columns of a weight that share a scale, without it the whole row. METHOD, without it {DEFAULT_METHOD}:")
    display.show(display.presets_table({n: preset(n) for n in examples()}))
    line("For other tools, with `paley export`: " + "; ".join(f"{n} ({what})" for n, (what, _) in TARGETS.items()))
    line("--set changes any value, for example --set calibration.sequences=64 inputs.clip_ratio=0.9 seed=1;")
    line("`paley presets NAME` shows all values.")
