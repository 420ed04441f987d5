"""What tuning after rounding gains, and in how many minutes: writes studies/results/tuning-MODEL.json.

python -m studies.tuning MODEL FOLDER --text FILE --test-text FILE [--test 4] [--seq-len 512] [--rows 64:0.001,...]
FOLDER: what `paley quantize MODEL` wrote, untuned, calibrated on text of the same source. A row SEQUENCES:RATE[:EPOCHS]
tunes its codes anew, on sequences that come after the calibration's. Gains are of pairs: the same test tokens before
and after.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from bench.record import Clock, provenance, save
from torch import Tensor

from paley.data import blocks_from_ids, token_blocks
from paley.eval.perplexity import token_scores
from paley.eval.reference import Reference
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source
from paley.model.reading import prepare_
from paley.ops.matmul import EXACT
from paley.pipeline.resolve import under_plan
from paley.pipeline.saving import load_stored
from paley.pipeline.tune import tune_
from paley.plan import Plan
from paley.recipe import Tune

RESULTS = Path(__file__).parent / "results"


def mean(values: Tensor) -> tuple[float, float]:
    """values [sequences, tokens] -> their mean, and its standard error over sequences."""
    rows = values.double().mean(1)
    return float(rows.mean()), float(rows.std()) / math.sqrt(len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--test-text", required=True)
    parser.add_argument("--test", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", default="64:0.001")
    arguments = parser.parse_args()
    source, plan = open_source(arguments.model), Plan.load(arguments.folder / "plan.json")
    problem, tokenizer, first = under_plan(source, plan), source.tokenizer(), plan.recipe.calibration.sequences
    rows = [list(map(float, row.split(":"))) for row in arguments.rows.split(",")]
    most = first + max(int(row[0]) for row in rows)
    length = arguments.seq_len
    text = token_blocks(arguments.text, tokenizer, role="calibration", count=most, seq_len=length, whole=True)
    test = token_blocks(
        arguments.test_text, tokenizer, role="test", count=arguments.test, seq_len=length, seed=None, whole=True
    )
    reference = Reference.of(source.load(), test)
    file = RESULTS / f"tuning-{Path(arguments.model).name}.json"
    result = json.loads(file.read_text()) if file.exists() else {"model": Path(arguments.model).name, "rows": {}}

    def scored(folder_model: object) -> Tensor:
        prepare_(folder_model, EXACT, torch.float32)  # type: ignore[arg-type]
        return token_scores(folder_model, test, reference)[1]  # type: ignore[arg-type]

    before = scored(load_stored(arguments.folder, problem, "cpu"))
    print(f"{arguments.folder.name}: KL {mean(before)[0]:.4f} ± {mean(before)[1]:.4f}", flush=True)
    for row in rows:
        tune = Tune(sequences=int(row[0]), rate=row[1], epochs=int(row[2]) if len(row) > 2 else 1)
        model, clock = load_stored(arguments.folder, problem, "cpu", product="packed"), Clock()
        blocks = blocks_from_ids(text.ids[first : first + tune.sequences], "calibration", text.source)
        tune_(problem, model, blocks, tune, clock, "cpu")
        clock.end()
        after = scored(model)
        (kl, kl_error), (gain, gain_error) = mean(after), mean(before - after)
        name = f"{arguments.folder.name} {tune.sequences} x {length}, rate {tune.rate:g}, {tune.epochs} epochs"
        result["rows"][name] = {
            "kl_before": mean(before)[0], "kl_before_stderr": mean(before)[1], "kl": kl, "kl_stderr": kl_error,
            "gain": gain, "gain_stderr": gain_error, "test": arguments.test,
            "seconds": {stage: round(seconds, 1) for stage, seconds in clock.stages.items()},
            "bytes": Checkpoint.open(arguments.folder).nbytes, **provenance(),
        }  # fmt: skip
        print(f"{name}: KL {kl:.4f} ± {kl_error:.4f}, gain {gain:.4f} ± {gain_error:.4f}", flush=True)
        save(result, file)


if __name__ == "__main__":
    main()
