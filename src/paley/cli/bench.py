"""`paley bench`: tokens a second, beside rivals in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import UsageError, line

if TYPE_CHECKING:
    from paley.pipeline.bench import Bench

__all__ = ["bench_verb"]


@verb("bench")
def bench_verb(
    folder: options.Folder,
    against: options.Rivals = None,
    gguf: options.Gguf = None,
    prompt_tokens: options.PromptTokens = 256,
    new_tokens: options.NewTokens = 64,
    rounds: options.Rounds = 3,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure how fast a quantized model reads a prompt and writes, and what bounds it. Rivals take turns with it.

    Run it on a quiet machine: speeds are medians of rounds, and the ratios are those of one run.

    Example: `paley bench llama-w4 --against bf16,llama.cpp --gguf llama-Q4_0.gguf`
    """
    from paley.cli import display
    from paley.cli.progress import watching

    if prompt_tokens < 1 or new_tokens < 1 or rounds < 1:
        raise UsageError("--prompt-tokens, --new-tokens and --rounds must be at least 1")
    with watching() as monitor:
        monitor.stage("measuring", rounds + 1)
        found = paley.bench(
            folder,
            against=[name.strip() for name in (against or "").split(",") if name.strip()],
            gguf=gguf,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            on_round=lambda number: monitor.step(f"round {number}" if number else "warming up"),
        )
    if as_json:
        display.emit(found.to_dict())
        return
    for text in _lines(found):
        line(text)


def _lines(found: Bench) -> list[str]:
    how = "the native engine" if found.engine == "native" else f"transformers ({found.reason})"
    lines = [
        f"{found.folder} on {how}, {found.threads} threads, {found.prompt_tokens} tokens read, {found.new_tokens} new:",
        f"  prefill {found.speed.prefill:,.1f} tokens/s, decode {found.speed.decode:,.1f} tokens/s",
    ]
    if found.bytes_per_token is not None and found.share is not None:
        lines.append(
            f"  {found.bytes_per_token:,} bytes a token: {found.share:.0%} of the {found.bandwidth / 1e9:.1f} GB/s "
            f"that memory gives, {found.bandwidth_of_one / 1e9:.1f} to one thread"
        )
    for name, speed in found.rivals.items():
        lines.append(
            f"  {name}: prefill {speed.prefill:,.1f}, decode {speed.decode:,.1f} tokens/s; "
            f"{found.speed.prefill / speed.prefill:.2f} and {found.speed.decode / speed.decode:.2f} times as fast here"
        )
    return lines
