"""Quantizes the demo model to 4 bits, loads it and lets it write: minutes, from the repository's folder."""

import paley

outcome = paley.quantize("assets/demo-model", "w4a4kv4", output="demo-out/in-python")
print(f"{outcome.results.bits_per_weight:.2f} bits per weight, every stored byte counted")

paley.generate(outcome.output, "The history of", max_new_tokens=40, write=lambda text: print(text, end="", flush=True))
print()
