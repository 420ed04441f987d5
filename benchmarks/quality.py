"""Quality of every method at equal bits, in one run: writes benchmarks/results/quality-MODEL.json.

python benchmarks/quality.py MODEL [--widths w4a4kv4,w3a3kv3] [--expand 0,...] ...
Each row: perplexity ± standard error, paired gap in nats, KL, top-1 agreement, all through the packed KV cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
from domain import MODELS, model_folder, texts

from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.loading import open_source
from paley.pipeline.accounting import parameter_count, quantized_bits
from paley.pipeline.monitor import Monitor
from paley.pipeline.stages import decide, execute
from paley.recipe import Recipe, apply_settings, preset

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "../src") else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
    }


def rows(width: str, expansions: list[str]) -> dict[str, tuple[Recipe, str]]:
    """name -> recipe and the command that gives it."""
    found = {name: preset(f"{name}-{width}") for name in ("rtn", "quarot", "quarot-clipped")}
    labelled = {name: (recipe, f"--preset {name}-{width}") for name, recipe in found.items()}
    for expand in expansions:
        flags = ["search.method=none", f"expand={expand}"]
        name = "paley without search" + (f" + {expand} columns" if expand != "0" else "")
        labelled[name] = (apply_settings(preset(width), flags), f"--preset {width} --set {' '.join(flags)}")
    labelled["paley"] = (preset(width), f"--preset {width}")
    return labelled


def measure(source, recipe: Recipe, blocks, reference: Reference) -> dict:
    start = time.time()
    plan = decide(source, recipe, blocks, None, Monitor(), "cpu")
    decided = time.time() - start
    model, _ = execute(source, plan, blocks, None, Monitor(), "cpu")
    executed = time.time() - start - decided
    result = evaluate(model, blocks.test, reference).to_dict()
    return result | {
        "bits_per_quantized_weight": quantized_bits(plan, source),
        "linear_flops_ratio": _linear_work(model) / _linear_work(source.load()),
        "trials": len(plan.trace),
        "seconds": {"decide": round(decided, 1), "execute": round(executed, 1)},
    }


def _linear_work(model) -> int:
    """Multiplications per token in the linears of the blocks and the head."""
    return sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--widths", default="w4a4kv4,w3a3kv3")
    parser.add_argument("--expand", default="0", help="columns added to the residual stream, comma-separated")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--search", type=int, default=32)
    parser.add_argument("--test", type=int, default=160)
    parser.add_argument("--only", help="renew these rows of an existing file, comma-separated: rtn,paley")
    parser.add_argument("--name", help="of the result file; default quality-MODEL")
    arguments = parser.parse_args()
    source = open_source(model_folder(arguments.model))
    blocks = texts(
        arguments.model,
        source.tokenizer(),
        calibration=arguments.calibration,
        search=arguments.search,
        test=arguments.test,
    )
    reference = Reference.of(source.load(), blocks.test)
    result = {
        "model": arguments.model,
        "parameters": parameter_count(source),
        "text": {"test": blocks.test.source, "calibration": blocks.calibration.source},
        "sequences": {
            "calibration": arguments.calibration,
            "search": arguments.search,
            "test": len(blocks.test.ids),
        },
        "seq_len": MODELS[arguments.model].seq_len,
        **provenance(),
        "original": {
            "nll": float(reference.nll.double().mean()),
            "perplexity": float(reference.nll.double().mean().exp()),
        },
        "rows": {},
    }
    file = RESULTS / f"{arguments.name or 'quality-' + arguments.model}.json"
    if arguments.only:
        result["rows"] = json.loads(file.read_text())["rows"]
    for width in arguments.widths.split(","):
        for name, (recipe, flags) in rows(width, arguments.expand.split(",")).items():
            if arguments.only and name not in arguments.only.split(","):
                continue
            row = measure(source, recipe, blocks, reference) | {"flags": flags, "commit": result["commit"]}
            result["rows"][f"{width} {name}"] = row
            print(f"{width} {name:24s} ppl {row['perplexity']:9.3f} gap {row['gap']:.4f} ± {row['gap_stderr']:.4f}  "
                  f"KL {row['kl']:.4f}  top-1 {row['top1_agreement']:.3f}  {row['seconds']}", flush=True)  # fmt: skip
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
