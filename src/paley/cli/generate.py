"""`paley generate`: a model continues a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, say

if TYPE_CHECKING:
    from paley.pipeline.generate import Generated

__all__ = ["generate_verb"]


@verb("generate")
def generate_verb(
    model: options.AnyModel,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    seed: options.DrawSeed = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Continue a prompt through the packed KV cache; text is streamed, speed and cache size go to stderr.

    Example: `paley generate llama-w4 "Once upon a time" --temperature 0.8`
    """
    from paley.cli import display

    made = paley.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        write=None if as_json else (lambda text: print(text, end="", flush=True)),
    )
    if as_json:
        display.emit({"model": model, "prompt": prompt, **made.to_dict()})
        return
    line()
    say(_summary(made))


def _summary(made: Generated) -> str:
    """One line for a person."""
    rate = made.tokens_per_second
    return (
        f"prompt: {made.prompt_tokens} tokens in {made.prompt_seconds:.2f} s; new: {made.tokens} tokens"
        + ("" if rate is None else f" at {rate:.1f} tokens/s")
        + f"; KV cache: {made.kv_cache_bytes:,} bytes"
    )
