"""Slopes of the linearity theorem by three metrics: writes studies/results/sensitivity-MODEL.json.

python -m studies.sensitivity MODEL [--text FILE] [--calibration 8] [--full "kl text"]
KL on random tokens, KL and perplexity on text, all with the norms folded; rank correlations
between them, with another seed, and with the unfolded model; all noise levels against early stopping (work is
block-forwards times tokens); and the KL that the slopes predict for weights of the rotated model rounded to nearest,
one layer at a time and all together, against the measured one.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from studies.experiment import RESULTS, Subject, provenance, save

from paley.core.metrics import rel_error
from paley.core.rounding import fitting_group_size
from paley.core.schemes import Rotation, WeightScheme
from paley.core.transforms import Transform
from paley.data import TokenBlocks, blocks_from_ids
from paley.methods.nearest import quantize_nearest
from paley.methods.sensitivity import AGREEMENT, LEVELS, Slope, measure_slopes
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.fold import fold_norms_
from paley.model.loading import Source, open_source
from paley.model.rotation import rotate_
from paley.model.sensitivity import NoiseProbe
from paley.model.trials import Objective, Prefix
from paley.pipeline.sensitivities import random_ids

GRIDS = ("gauss4", "gauss3")
GROUP_SIZE = 32
METRICS = {"kl text": "kl", "kl random": "kl", "ppl text": "perplexity"}


class Meter:
    """A probe whose trials are kept, with what each cost: early stopping then needs no second run to be timed."""

    def __init__(self, source: Source, blocks: TokenBlocks, metric: str, *, seed: int = 0, fold: bool = True):
        adapter = Adapter(source.load())
        if fold:
            fold_norms_(adapter)
        self.runner = BlockRunner(adapter)
        self.probe = NoiseProbe(self.runner, blocks.ids, metric=metric, kinds=("weight",), rotated=fold, seed=seed)
        self.trials: dict[tuple[str, int], tuple[float, float, int]] = {}

    def slopes(self, agreement: float | None = None) -> tuple[dict[str, Slope], dict]:
        """-> the slopes, and {trials, seconds, work} of measuring them."""
        cost = {"trials": 0, "seconds": 0.0, "work": 0}

        def delta(slot: str, t: float, draw: int) -> float:
            if (slot, draw) not in self.trials:
                before, start = self.runner.work, time.perf_counter()
                value = self.probe.delta(slot, t, draw)
                self.trials[slot, draw] = value, time.perf_counter() - start, self.runner.work - before
            value, seconds, work = self.trials[slot, draw]
            cost["trials"] += 1
            cost["seconds"] += seconds
            cost["work"] += work
            return value

        linears = [name for name, site in self.probe.sites.items() if site.kind == "linear"]
        return measure_slopes(linears, delta, agreement=agreement), cost


def spearman(a: dict[str, Slope], b: dict[str, Slope]) -> float:
    ranks = [torch.tensor([s[n].alpha for n in a]).argsort().argsort().double() for s in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def rounded(source: Source, blocks: TokenBlocks, slopes: dict[str, Slope], grid: str) -> dict:
    """KL of rounding the rotated model's weights to nearest, measured and as the slopes predict it."""
    adapter = Adapter(source.load())
    width, head = adapter.sites.embedding.shape[1], adapter.sites.of("keys")[0].shape[1]
    rotate_(adapter, Rotation(Transform(width, width, width, seed=1), Transform(head, head, head, seed=2)), {})
    runner = BlockRunner(adapter)
    objective = Objective(runner, blocks.ids, runner.suffix(0, runner.embed(blocks.ids)), "kl")
    prefix, ratios, t2, changed = Prefix(runner, blocks.ids), {}, {}, {}
    for block in adapter.blocks:
        for site in block.linears():
            name, weight = site.name, adapter.module(site.module).weight.data
            before = weight.clone()
            scheme = WeightScheme(grid, fitting_group_size(weight.shape[1], GROUP_SIZE), method="nearest")
            changed[name] = quantize_nearest(weight, scheme).dequantize()
            t2[name] = rel_error(weight, changed[name])
            weight.copy_(changed[name])
            kl = objective(runner.suffix(block.index, prefix.before(block.index)))
            weight.copy_(before)
            ratios[name] = kl / (slopes[name].alpha * t2[name])
    for name, weight in changed.items():
        adapter.module(name).weight.data.copy_(weight)
    together = objective(runner.suffix(0, runner.embed(blocks.ids)))
    top = sorted(slopes, key=lambda name: -slopes[name].alpha)[:10]
    return {
        "mean_t2": statistics.mean(t2.values()),
        "ratio_measured_to_predicted": ratios,
        "median_ratio": statistics.median(ratios.values()),
        "ratios_of_the_ten_largest_slopes": [round(ratios[name], 3) for name in top],
        "all_layers": {"measured": together, "predicted": sum(slopes[name].alpha * t2[name] for name in slopes)},
    }


def main() -> None:
    parser = Subject.parser(__doc__, calibration=8, search=0, test=0)
    parser.add_argument("--full", default=",".join(METRICS), help="measured at all levels too, comma-separated")
    arguments = parser.parse_args()
    subject = Subject.of(arguments)
    source = open_source(subject.model)
    tokenizer = source.tokenizer()
    text = subject.texts(tokenizer).calibration
    assert text is not None
    ids = random_ids(tokenizer, source, subject.calibration, subject.seq_len, 0)
    noise = blocks_from_ids(ids, "calibration", "random")
    result: dict = {
        "model": subject.name, "tokens": text.ids.numel(), "levels": LEVELS, **provenance(), "metrics": {},
    }  # fmt: skip
    file = RESULTS / f"sensitivity-{subject.name}.json"
    early: dict[str, dict[str, Slope]] = {}
    for name, metric in METRICS.items():
        blocks = noise if name == "kl random" else text
        meter = Meter(source, blocks, metric)
        early[name], cost = meter.slopes(AGREEMENT)
        row = {"baseline": meter.probe.baseline, "early stop": cost, "slopes": values(early[name])}
        # What one would pay without the cached prefix; perplexity takes noise and its mirror image.
        forwards = cost["trials"] * (2 if metric == "perplexity" else 1)
        cost["whole-model work"] = forwards * blocks.ids.numel() * len(meter.runner.adapter.blocks)
        if name in arguments.full.split(","):
            every, row["all levels"] = meter.slopes()
            row["slopes of all levels"] = values(every)
            row["early stop, rank correlation with all levels"] = spearman(early[name], every)
            changes = [abs(early[name][n].alpha / s.alpha - 1) for n, s in every.items()]
            row["early stop, median and largest change of a slope"] = statistics.median(changes), max(changes)
        result["metrics"][name] = row
        print(name, json.dumps({k: v for k, v in row.items() if "slopes" not in k or "change" in k}), flush=True)
        pairs = [(a, b) for a in early for b in early if a < b]
        result["rank correlations"] = {f"{a}, {b}": spearman(early[a], early[b]) for a, b in pairs}
        save(result, file)
    result["rounded to nearest"] = {grid: rounded(source, text, early["kl text"], grid) for grid in GRIDS}
    for name, other in (("another seed", {"seed": 1}), ("unfolded", {"fold": False})):
        slopes, _ = Meter(source, text, "kl", **other).slopes(AGREEMENT)
        ratios = [slopes[n].alpha / s.alpha for n, s in early["kl text"].items()]
        result[f"kl text, {name}"] = {
            "rank correlation": spearman(early["kl text"], slopes), "smallest ratio": min(ratios),
            "median ratio": statistics.median(ratios), "largest ratio": max(ratios), "slopes": values(slopes),
        }  # fmt: skip
    save(result, file)
    print(json.dumps(result["rank correlations"]))


def values(slopes: dict[str, Slope]) -> dict[str, list[float]]:
    return {name: [slope.alpha, slope.stderr] for name, slope in slopes.items()}


if __name__ == "__main__":
    main()
