"""Quantizes the small model in assets/ to 3-bit weights, activations and KV cache in four ways, and compares.

Run by `make demo`. The text is Python's own documentation, so nothing is downloaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import paley
from paley.recipe import apply_settings, preset

ROOT = Path(__file__).resolve().parents[1]
MODEL, OUT = ROOT / "assets" / "demo-model", ROOT / "demo-out"
ROWS = {
    "round to nearest": "rtn-w3a3kv3",
    "QuaRot, clips 1.0": "quarot-w3a3kv3",
    "QuaRot, clips 0.9 / 0.95": "quarot-clipped-w3a3kv3",
    "Paley": "w3a3kv3",
}
SETTINGS = [
    "calibration.sequences=48", "calibration.seq_len=256", "test.sequences=48", "test.seq_len=256",
]  # fmt: skip


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, start = Console(), time.monotonic()
    console.print("A LLaMA of 11.9 million parameters to W3A3KV3, scored on Python's documentation ...")
    results = {}
    for name, wanted in ROWS.items():
        recipe = apply_settings(preset(wanted), SETTINGS)
        outcome = paley.quantize(MODEL, recipe, output=OUT / wanted, overwrite=True)
        results[name] = outcome.results
        console.print(f"  {name}: done after {time.monotonic() - start:.0f} s")
    if len({r.evaluation.sha256 for r in results.values() if r.evaluation}) != 1:
        raise paley.PaleyError("the rows were scored on different text")
    console.print(_table(results))
    console.print("Perplexity and KL divergence through the packed KV cache; sizes count every stored byte.")
    console.print("Paley's own preset codes the embedding and the head too; in the other rows they keep 16 bits.")
    _sample(console)
    console.print(f"\nNext: .venv/bin/paley inspect {(OUT / ROWS['Paley']).relative_to(ROOT)}")


def _table(results: dict[str, paley.Results]) -> Table:
    table = Table("", "perplexity", "KL, nats/token", "bits per weight", "of the quantized", "bytes on disk")
    first = next(iter(results.values()))
    original = first.evaluation.reference_perplexity
    table.add_row("original", f"{original:.2f}", "0", "16", "16", f"{first.original_bytes:,}")
    for name, r in results.items():
        e = r.evaluation
        table.add_row(
            name,
            f"{e.perplexity:.2f} ± {e.perplexity_stderr:.2f}",
            f"{e.kl:.4f} ± {e.kl_stderr:.4f}",
            f"{r.bits_per_weight:.2f}",
            f"{r.bits_per_quantized_weight:.2f}",
            f"{r.bytes:,}",
        )
    return table


def _sample(console: Console) -> None:
    made = paley.generate(OUT / ROWS["Paley"], "The function returns", max_new_tokens=60, temperature=0.7)
    console.print("\nA sample of what the 3-bit model writes (the original is small and undertrained too):")
    console.print(f"The function returns{made.text}", style="italic", markup=False)


if __name__ == "__main__":
    sys.exit(main())
