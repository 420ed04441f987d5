"""The linearity theorem on whole models: writes studies/results/linearity-MODEL.json.

python -m studies.linearity MODEL [--text FILE] [--calibration 16] [--test 96] [--processes 1] [--stretched] [--kl]
python -m studies.linearity MODEL --slopes [--calibration 16]
Slopes on text, on text that the model samples itself and on random tokens; then random and uniform allocations of the
two-dimensional grids to the linears (HIGGS, weights alone), and for each the predicted sum of alpha t^2, t^2 the grid's
own, beside the measured KL and growth of perplexity on test text. --kl: without perplexity, whose slopes want noise and
hours on a real model; those of KL are by gradients. --slopes: only the slopes, beside the rows that a
model's files have. --stretched: scales as our preset has them, their error t^2 / (1 - t^2); into a file of its own.
`linearity_figure` draws the files.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from studies.experiment import BLOCKS_ALONE, RESULTS, Subject, named, provenance, read

from paley.core import grids, tables
from paley.core.packing import stored_bits
from paley.core.schemes import Schemes
from paley.data import blocks_from_ids
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.eval.sampling import sample_documents
from paley.methods.nearest import gaussian_error, gaussian_spread
from paley.methods.sensitivity import MAX_T
from paley.model.loading import Source, open_source
from paley.model.problem import Problem
from paley.model.rotation import input_blocks
from paley.pipeline.accounting import quantized_bits
from paley.pipeline.execute import execute
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import measure_on, random_ids
from paley.pipeline.texts import Texts
from paley.recipe import Recipe, apply_settings, preset
from paley.recipe.saving import json_lines

SLOPES = {"kl, text": "kl", "perplexity, text": "perplexity", "kl, self": "kl", "kl, random": "kl"}
UNIFORM = ("p2n16", "p2n24", "p2n32", "p2n64", "p2n88", "p2n128", "p2n256", "p2n512")
GAUSSIAN = ("p2n256", "p2n64", "p2n16")  # uniform models whose every layer is compared with Gaussian weights
RANDOM = (("3 to 5 bits", 30, 3.0, 5.0, MAX_T**2), ("2 to 3 bits", 10, 2.0, 3.0, 1.0))  # last: largest t^2
RANGES = (1.5, 2.25, 2.75, 3.25, 3.75, 4.25, 5.25)
LINEAR = 0.67, 1.5


@functools.cache
def setting(subject: Subject, scale_search: str) -> tuple[Source, Texts, Reference, Problem]:
    source = open_source(subject.model)
    blocks = subject.texts(source.tokenizer())
    problem = resolve(source, higgs(f"weights.scale_search={scale_search}"))
    return source, blocks, Reference.of(source.load(), blocks.test), problem


def higgs(*settings: str) -> Recipe:
    return apply_settings(preset("higgs-2" + BLOCKS_ALONE), list(settings))


def slopes(name: str, subject: Subject, scale_search: str) -> dict:
    source, blocks, _, _ = setting(subject, scale_search)
    tokenizer, sequences, seq_len = source.tokenizer(), subject.calibration, subject.seq_len
    text = blocks.calibration
    if name.endswith("self"):
        ids = sample_documents(source.load(), tokenizer, count=sequences, tokens=seq_len, seed=0)
        text = blocks_from_ids(ids, "calibration", "self")
    elif name.endswith("random"):
        text = blocks_from_ids(random_ids(tokenizer, source, sequences, seq_len, 0), "calibration", "random")
    found = measure_on(source, text, metric=SLOPES[name])
    values = {n: [s.alpha, s.stderr, *(["clamped"] if s.clamped else [])] for n, s in found.slots.items()}
    return {"source": named(text.source), "tokens": text.ids.numel(), "baseline": found.baseline, "slopes": values}


def error(grid: str, stretched: bool) -> float:
    """t^2 of a layer on the grid."""
    t2 = grids.load(grid).mse
    return t2 / (1 - t2) if stretched else t2


def allocations(sizes: dict[str, int]) -> dict[str, dict[str, str]]:
    """Row -> grid of each linear; random ones are normal around a level, shifted until the mean bits are as drawn."""
    found = {f"uniform {name}": dict.fromkeys(sizes, name) for name in UNIFORM}
    weights = np.array(list(sizes.values())) / sum(sizes.values())
    generator = np.random.default_rng(0)
    for label, count, low, high, largest in RANDOM:
        names = [n for n in tables.names() if n.startswith("p2") and grids.load(n).mse <= largest]
        rates = np.array([stored_bits(grids.load(n)) for n in names])
        for index in range(count):
            target = low + (high - low) * (index + generator.random()) / count
            wanted = generator.uniform(0.2, 1.5) * generator.standard_normal(len(sizes))
            shifted = [np.abs(rates - (wanted + s)[:, None]).argmin(1) for s in np.linspace(-1, 9, 1001)]
            chosen = min(shifted, key=lambda c: abs(rates[c] @ weights - target))
            found[f"random {label} {index}"] = {n: names[c] for n, c in zip(sizes, chosen, strict=True)}
    return found


def row(name: str, chosen: dict[str, str], subject: Subject, scale_search: str) -> dict:
    source, blocks, reference, problem = setting(subject, scale_search)
    linears = dict(problem.schemes.linears)
    for n, grid in chosen.items():
        linears[n] = replace(linears[n], weight=replace(linears[n].weight, grid=grid))
    problem = problem.with_schemes(Schemes(linears, problem.schemes.attentions))
    made = execute(problem, None, None, Monitor(), "cpu")
    quantized, reports = made.model, made.reports
    score = evaluate(quantized, blocks.test, reference)
    original = float(reference.nll.double().mean().exp())
    weights = np.array([source.sites[n].numel for n in chosen])
    bits = [stored_bits(grids.load(g)) for g in chosen.values()]
    return {
        "grid_bits": float(bits @ weights / weights.sum()), "stored_bits": quantized_bits(problem),
        "largest_t2": max(grids.load(g).mse for g in chosen.values()), "kl": score.kl, "kl_stderr": score.kl_stderr,
        "perplexity": score.perplexity - original, "perplexity_stderr": score.gap_stderr * score.perplexity,
        "grids": " ".join(chosen.values()),
    } | ({"rel_error": {r.name: r.rel_error for r in reports}} if name.split()[-1] in GAUSSIAN else {})  # fmt: skip


def summary(result: dict) -> dict:
    """Adds to each row what the slopes predict for it -> how well they do."""
    rows, t2 = result["rows"], result["t2"]
    of = {key: np.array([found["slopes"][n][0] for n in result["linears"]]) for key, found in result["slopes"].items()}
    found: dict = {}
    for metric in dict.fromkeys(SLOPES[name] for name in result["slopes"]):
        for values in rows.values():
            values[f"{metric}_predicted"] = float(of[f"{metric}, text"] @ [t2[g] for g in values["grids"].split()])
        columns = ("grid_bits", metric, f"{metric}_predicted", f"{metric}_stderr")
        found[metric] = agreement(np.array([[r[c] for c in columns] for r in rows.values()]).T, np.array(list(rows)))
    found["rank correlations of slopes"] = {
        f"{a}; {b}": float(spearmanr(of[a], of[b])[0]) for a, b in itertools.combinations(of, 2)
    }
    for grid in GAUSSIAN:
        expected = gaussian_errors(result, grid)
        off = {n: error / expected[n] - 1 for n, error in rows[f"uniform {grid}"]["rel_error"].items()}
        one = gaussian_spread(grids.load(grid))  # a small matrix of Gaussian values is off by chance
        errors = {n: one / result["linears"][n] ** 0.5 for n in off}
        beyond = {n: [round(d, 4), round(d / errors[n], 1)] for n, d in off.items() if abs(d) > 0.03}
        found[f"rel_error / that of Gaussian weights - 1, {grid}"] = {
            "mean": float(np.mean(list(off.values()))), "largest": max(off.values(), key=abs),
            "largest in standard errors": max((d / errors[n] for n, d in off.items()), key=abs),
            "layers": len(off), "beyond 3% and 3 standard errors": sum(abs(s) > 3 for _, s in beyond.values()),
            "beyond 3%, and in standard errors": beyond,
        }  # fmt: skip
    return found


def gaussian_errors(result: dict, grid: str) -> dict[str, float]:
    """The rel_error that each linear would have were its rotated weights Gaussian, in groups as `setting` has them."""
    scale_search = "unbiased" if "--stretched" in result["command"] else "rms"
    recipe = higgs(f"weights.grid={grid}", f"weights.scale_search={scale_search}")
    found = {}
    for name in result["linears"]:
        blocks = input_blocks(result["in_features"][name], recipe.hadamard, recipe.seed)
        found[name] = gaussian_error(replace(recipe.weights, group_size=blocks.order), blocks.out_dim)
    return found


def agreement(columns: np.ndarray, names: np.ndarray) -> dict:
    """columns [bits, measured, predicted, stderr] [4, rows]; correlations are of the random rows at 3 to 5 bits."""
    drawn = np.char.startswith(names, "random 3")
    (bits, measured, predicted), ratio = columns[:3, drawn], columns[1] / columns[2]
    grown = measured > 0
    logs = np.log(columns[1:3, drawn][:, grown])
    # Mean bits alone order such a range well too: what do slopes know beyond them?
    left = [x - np.polyval(np.polyfit(bits[grown], x, 1), bits[grown]) for x in logs]
    error = 2 * columns[3] / columns[2]
    outside = (ratio + error < LINEAR[0]) | (ratio - error > LINEAR[1])
    medians = {}
    for low, high in itertools.pairwise(RANGES):
        inside = ratio[(columns[0] >= low) & (columns[0] < high)]
        medians[f"{low:g} to {high:g}"] = [float(np.median(inside)), len(inside)]
    return {
        "spearman": float(spearmanr(predicted, measured)[0]), "pearson of logs": float(pearsonr(*logs)[0]),
        "spearman of mean bits": float(spearmanr(-bits, measured)[0]),
        "pearson of logs, bits regressed out": float(pearsonr(*left)[0]), "not grown": int((~grown).sum()),
        "median, smallest and largest ratio": np.quantile(ratio[drawn], [0.5, 0, 1]).tolist(),
        "median ratio by bits": medians,
        "most bits outside": {
            kind: float(columns[0][outside & np.char.startswith(names, kind)].max(initial=0))
            for kind in ("uniform", "random")
        },
        "least predicted outside": float(columns[2][outside].min()) if outside.any() else None,
    }  # fmt: skip


def save(result: dict) -> None:
    result["summary"] = summary(result)
    kind = "linearity-stretched" if "--stretched" in result["command"] else "linearity"
    (RESULTS / f"{kind}-{result['model']}.json").write_text(json_lines(result, levels=3) + "\n")


def renew_slopes(subject: Subject) -> None:
    found = {name: slopes(name, subject, "rms") for name in SLOPES}
    for kind in ("linearity", "linearity-stretched"):
        if (result := read(f"{kind}-{subject.name}.json")) is not None:
            save(result | {"slopes": found, "commit of slopes": provenance()["commit"]})


def main() -> None:
    parser = Subject.parser(__doc__, calibration=16, search=0, test=96)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--slopes", action="store_true", help="renew the slopes of existing files")
    parser.add_argument("--stretched", action="store_true", help="scales by `unbiased` instead of `rms`")
    parser.add_argument("--kl", action="store_true", help="KL alone, its slopes by gradients")
    arguments = parser.parse_args()
    subject = Subject.of(arguments)
    if arguments.slopes:
        renew_slopes(replace(subject, test=1))
        return
    where = subject, "unbiased" if arguments.stretched else "rms"
    source, blocks, reference, _ = setting(*where)
    linears = source.sites.of("linear")
    sizes = {site.name: site.numel for site in linears}
    rows, wanted = allocations(sizes), [name for name in SLOPES if SLOPES[name] == "kl" or not arguments.kl]
    result: dict = {
        "model": subject.name, "command": " ".join(["python -m studies.linearity", *map(named, sys.argv[1:])]),
        **provenance(), "test": named(blocks.test.source), "sequences": len(blocks.test.ids),
        "original_perplexity": float(reference.nll.double().mean().exp()),
        "linears": sizes, "in_features": {site.name: site.shape[1] for site in linears},
        "t2": {n: error(n, arguments.stretched) for n in tables.names() if n.startswith("p2")},
        "slopes": {}, "rows": {},
    }  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, spawn, torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(slopes, name, *where): ("slopes", name) for name in wanted}
        jobs |= {pool.submit(row, name, chosen, *where): ("rows", name) for name, chosen in rows.items()}
        for job in as_completed(jobs):
            kind, name = jobs[job]
            result[kind][name] = job.result()
            print(kind, name, job.result().get("kl", ""), flush=True)
    result["slopes"] = {name: result["slopes"][name] for name in wanted}
    result["rows"] = {name: result["rows"][name] for name in rows}
    save(result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
