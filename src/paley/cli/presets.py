"""`paley presets`: lists the packaged recipes."""

from __future__ import annotations

from paley.cli.app import verb
from paley.cli.process import line

__all__ = ["presets_verb"]


@verb("presets")
def presets_verb() -> None:
    """List the packaged recipes, and say how their names are read.

    Example: `paley presets`
    """
    from paley.cli import display
    from paley.recipe import examples, preset
    from paley.recipe.presets import DEFAULT_METHOD, GRAMMAR

    line(f"NAME = {GRAMMAR}")
    line("W, A and KV: bits of the weights, the linear layers' inputs and the KV cache; 16: unquantized.")
    line(f"G: columns of a weight that share a scale, without it the whole row. METHOD, without it {DEFAULT_METHOD}:")
    display.show(display.presets_table({name: preset(name) for name in examples()}))
    line("--set changes any value, for example --set calibration.sequences=64 inputs.clip_ratio=0.9 seed=1;")
    line("the plan.json that quantize writes begins with the whole recipe.")
