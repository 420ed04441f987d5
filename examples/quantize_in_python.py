"""Quantizes the demo model to 4 bits, loads it and lets it write: minutes, from the repository's folder."""

from transformers import AutoTokenizer

import paley

outcome = paley.quantize("assets/demo-model", "w4a4kv4", output="demo-out/in-python")
print(f"{outcome.results['bits_per_weight']:.2f} bits per weight, every stored byte counted")

model, tokenizer = paley.load(outcome.output), AutoTokenizer.from_pretrained(outcome.output)
prompt = tokenizer("The history of", return_tensors="pt")
cache = paley.cache_argument(model, paley.PackedKVCache(model))  # by the name that this transformers has for it
ids = model.generate(**prompt, **cache, max_new_tokens=40)
print(tokenizer.decode(ids[0]))
