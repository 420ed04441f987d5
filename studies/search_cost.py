"""The paper's search against ours on the same quantized weights: writes studies/results/search-cost-MODEL.json.

python -m studies.search_cost MODEL [--bits 3]
Work is block-forwards times tokens, counted; both use the same tokens, grids (absmax, as published) and weights. Also
compared with ours: the paper's slots, perplexity as the objective, the start from full precision, fewer tokens. Both
multiply float32; a run's own search takes bfloat16 if there are instructions for that.
"""

from __future__ import annotations

import functools
import time

import torch
from studies.experiment import BLOCKS_ALONE, Experiment, save

from paley.eval.perplexity import evaluate
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.problem import Problem
from paley.model.search import ClipSearch
from paley.pipeline.execute import prepare_
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
    parser = Experiment.parser(__doc__, calibration=128, search=32, test=96)
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()
    bits = arguments.bits
    experiment = Experiment("search-cost", arguments)
    grids = [g % bits if "%" in g else g for g in GRIDS]
    recipe = apply_settings(preset(f"gbs-w{bits}a{bits}kv{bits}{BLOCKS_ALONE}"), grids)
    quantized = experiment.quantize(recipe)
    start = quantized.row
    tokens = experiment.blocks.search.ids.numel()
    experiment.result |= {"bits": bits, "search_tokens": tokens, "not searched": start}
    print(f"{'not searched':40s} gap {start['gap']:.4f} ± {start['gap_stderr']:.4f}", flush=True)
    counts = [(name, s, arguments.search) for name, s in VARIANTS.items()]
    counts += [(f"ours, {n} sequences", Search(), n) for n in (arguments.search // 8, arguments.search // 2)]
    for name, settings, sequences in counts:
        measure = functools.partial(run, experiment, Adapter(quantized.model), quantized.problem, settings, sequences)
        experiment.row(name, lambda measure=measure: {"bits": start["bits"]} | measure())
    rows = experiment.result["rows"]
    if {"paper", "ours"} <= set(rows):
        for key, of in (("work_ratio", "work"), ("time_ratio", "seconds")):
            experiment.result[key] = rows["paper"][of] / rows["ours"][of]
            print(f"paper / ours: {of} {experiment.result[key]:.1f}")
        save(experiment.result, experiment.file)


def run(experiment: Experiment, adapter: Adapter, problem: Problem, settings: Search, sequences: int) -> dict:
    """One search on the model as it stands (its weights are final), and the score it leads to."""
    ids = experiment.blocks.search.ids[:sequences]
    runner = BlockRunner(adapter)
    hidden = original_hidden(problem, ids)
    trials: list = []
    search = ClipSearch(runner, ids, hidden, problem.schemes, settings)
    runner.work, begin = 0, time.perf_counter()
    search.run(on_trial=trials.append)
    seconds = time.perf_counter() - begin
    score = evaluate(adapter.model, experiment.blocks.test, experiment.reference).to_dict()
    return {**score, "settings": settings.model_dump(), "work": runner.work, "seconds": seconds, "trials": len(trials)}


@torch.no_grad()
def original_hidden(problem: Problem, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of the original in the rotated model's coordinates."""
    adapter = Adapter(problem.source.load())
    prepare_(problem, adapter)
    runner = BlockRunner(adapter)
    return runner.suffix(0, runner.embed(ids))


if __name__ == "__main__":
    main()
