"""What `paley quantize` costs: seconds against layers and against calibration tokens, peak memory against size.

python -m bench.cost: random LLaMAs, one process a measurement; writes bench/results/cost.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import torch
from bench.record import DEMO, RESULTS, provenance, save
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import paley
from paley.recipe import apply_settings, preset

LAYERS, TOKENS, WIDTHS = (2, 4, 8), (4096, 8192, 16384), (256, 512, 1024)
SEQ_LEN = 256


def measure(layers: int, hidden: int, tokens: int) -> dict:
    """Runs in a process of its own, so that peak memory is this run's."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(f"{folder}/model")
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(f"{folder}/model")
        del model
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        recipe = apply_settings(
            preset("w3a3kv3"),
            [
                f"calibration.sequences={tokens // SEQ_LEN}", f"calibration.seq_len={SEQ_LEN}", "search.method=none",
                "test.sequences=2", f"test.seq_len={SEQ_LEN}",
            ],
        )  # fmt: skip
        start = time.perf_counter()
        paley.quantize(f"{folder}/model", recipe, output=f"{folder}/out")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "layers": layers, "hidden": hidden, "tokens": tokens, "seconds": seconds, "model_bytes_float32": size,
        "peak_bytes": peak, "peak_before": before, "calibration_bytes": 2 * tokens * hidden * 4,
    }  # fmt: skip


def child(*sizes: int) -> dict:
    output = subprocess.run(
        [sys.executable, "-m", "bench.cost", "--one", *map(str, sizes)], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, nargs=3, metavar=("LAYERS", "HIDDEN", "TOKENS"), help="measure this alone")
    if one := parser.parse_args().one:
        print(json.dumps(measure(*one)))
        return
    child(1, 128, 2048)  # warms the file cache
    plans = {
        "by_layers": [(layers, 256, 4096) for layers in LAYERS],
        "by_tokens": [(2, 256, tokens) for tokens in TOKENS],
        "by_size": [(2, hidden, 4096) for hidden in WIDTHS],
    }
    result = {**provenance(), **{group: [] for group in plans}}
    for group, sizes in plans.items():
        for size in sizes:
            r = child(*size)
            result[group].append(r)
            print(f"{group:10s} {r['layers']:3d} layers  hidden {r['hidden']:5d}  {r['tokens']:6d} tokens  "
                  f"{r['seconds']:6.1f} s  model {r['model_bytes_float32'] / 1e6:6.1f} MB  "
                  f"peak {r['peak_bytes'] / 1e6:6.0f} MB", flush=True)  # fmt: skip
            save(result, RESULTS / "cost.json")


if __name__ == "__main__":
    main()
