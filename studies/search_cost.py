"""The paper's search against ours on the same quantized weights: writes benchmarks/results/search-cost-MODEL.json.

python benchmarks/search_cost.py MODEL [--bits 3]
Work is block-forwards times tokens, counted; both use the same tokens, grids (absmax, as published) and weights. Also
compared with ours: the paper's slots, perplexity as the objective, the start from full precision, fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from domain import MODELS, model_folder, texts
from experiment import RESULTS, provenance

from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.calibrate import set_attention_, set_input_
from paley.model.capture import BlockRunner
from paley.model.loading import open_source
from paley.model.search import ClipSearch
from paley.pipeline.monitor import Monitor
from paley.pipeline.stages import decide, execute, prepare_
from paley.recipe import apply_settings, preset
from paley.recipe.models import Search

# From unclipped integers, where there is something to find, as in the paper's runs.
GRIDS = ["inputs={grid: int%s, scale: absmax}", "keys={grid: int%s}", "values={grid: int%s}", "search.method=none"]
PAPER = Search(schedule="paper", slots="per_projection", start="from_fp", objective="perplexity", iterations=10)
VARIANTS = {
    "paper": PAPER,
    "ours": Search(),
    "ours, six trials": Search(iterations=6),
    "ours, the paper's slots": Search(slots="per_projection"),
    "ours, perplexity": Search(objective="perplexity"),
    "ours, from full precision": Search(start="from_fp"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--search", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--test", type=int, default=96)
    arguments = parser.parse_args()
    bits = arguments.bits
    source = open_source(model_folder(arguments.model))
    blocks = texts(
        arguments.model, source.tokenizer(),
        calibration=arguments.calibration, search=arguments.search, test=arguments.test,
    )  # fmt: skip
    original = source.load()
    reference = Reference.of(original, blocks.test)
    recipe = apply_settings(preset(f"w{bits}a{bits}kv{bits}"), [g % bits if "%" in g else g for g in GRIDS])
    plan = decide(source, recipe, blocks, None, Monitor(), "cpu")
    model, _ = execute(source, plan, blocks, None, Monitor(), "cpu")
    start = evaluate(model, blocks.test, reference)
    result = {
        "model": arguments.model, "bits": bits, "search_tokens": blocks.search.ids.numel(), **provenance(),
        "not searched": start.to_dict(), "rows": {},
    }  # fmt: skip
    print(f"{'not searched':30s} gap {start.gap:.4f} ± {start.gap_stderr:.4f}", flush=True)
    counts = [(name, s, arguments.search) for name, s in VARIANTS.items()]
    counts += [(f"ours, {n} sequences", Search(), n) for n in (arguments.search // 8, arguments.search // 2)]
    for name, settings, sequences in counts:
        row = run(Adapter(model), source, plan, settings, blocks, sequences, reference)
        result["rows"][name] = row
        print(f"{name:30s} gap {row['gap']:.4f} ± {row['gap_stderr']:.4f}  work {row['work']:,}  "
              f"{row['seconds']:.1f} s  {row['trials']} trials", flush=True)  # fmt: skip
    paper, ours = result["rows"]["paper"], result["rows"]["ours"]
    result["work_ratio"] = paper["work"] / ours["work"]
    result["time_ratio"] = paper["seconds"] / ours["seconds"]
    print(f"paper / ours: work {result['work_ratio']:.1f}, seconds {result['time_ratio']:.1f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"search-cost-{arguments.model}.json").write_text(json.dumps(result, indent=1) + "\n")


def run(adapter: Adapter, source, plan, settings: Search, blocks, sequences: int, reference: Reference) -> dict:
    """One search on the model as it stands (its weights are final), and the score it leads to."""
    ids = blocks.search.ids[:sequences]
    runner = BlockRunner(adapter)
    hidden = original_hidden(source, plan, ids)
    trials: list = []
    search = ClipSearch(runner, ids, hidden, plan.linears, plan.attentions, settings)
    runner.work, begin = 0, time.perf_counter()
    search.run(on_trial=trials.append)
    seconds = time.perf_counter() - begin
    score = evaluate(adapter.model, blocks.test, reference).to_dict()
    return {**score, "settings": settings.model_dump(), "work": runner.work, "seconds": seconds, "trials": len(trials)}


@torch.no_grad()
def original_hidden(source, plan, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of the original in the rotated model's coordinates."""
    adapter = Adapter(source.load())
    prepare_(source, adapter, plan)
    for block in adapter.blocks:
        set_attention_(block, None)
        for role, _ in block.linears():
            set_input_(block.part(role), None)
    runner = BlockRunner(adapter)
    return runner.suffix(0, runner.embed(ids))


if __name__ == "__main__":
    Path(RESULTS).mkdir(exist_ok=True)
    main()
