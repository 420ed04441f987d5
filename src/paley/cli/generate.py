"""`paley generate`: a model continues a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, say, stream
from paley.core.errors import PaleyError

if TYPE_CHECKING:
    from paley.pipeline.generate import Generated

__all__ = ["generate_verb", "summary"]


@verb("generate")
def generate_verb(
    model: options.AnyModel,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 100,
    chat: options.ChatFlag = False,
    system: options.System = None,
    stop: options.Stop = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.DrawSeed = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Continue a prompt through the packed KV cache; text is streamed, speed and cache size go to stderr.

    Example: `paley generate llama-w4 "Once upon a time" --temperature 0.8`
    """
    from paley.cli import display

    if prompt == "-":
        prompt = _stdin()
    made = paley.generate(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop or (), chat=chat, system=system, device=device,
        write=None if as_json else stream,
    )  # fmt: skip
    if as_json:
        display.emit({"model": model, "prompt": prompt, **made.to_dict()})
        return
    line()
    say(summary(made))


def _stdin() -> str:
    """All of stdin, without the newline that ends its last line."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PaleyError(f"stdin: is not UTF-8 text (byte {error.start})", remedy="convert it, with iconv") from None


def summary(made: Generated) -> str:
    """One line for a person."""
    rate = made.tokens_per_second
    return (
        f"prompt: {made.prompt_tokens} tokens in {made.prompt_seconds:.2f} s; new: {made.tokens} tokens"
        + ("" if rate is None else f" at {rate:.1f} tokens/s")
        + f"; KV cache: {made.kv_cache_bytes:,} bytes"
    )
