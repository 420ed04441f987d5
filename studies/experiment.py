"""What the quality benchmarks share: a model, text of its domain, the original's score, and a JSON file of rows."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from domain import MODELS, model_folder, texts
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.calibrate import LayerReport
from paley.model.loading import open_source
from paley.pipeline.accounting import parameter_count, quantized_bits
from paley.pipeline.monitor import Monitor
from paley.pipeline.stages import decide, execute
from paley.plan import Plan
from paley.recipe import Recipe
from paley.sensitivity import Sensitivity

__all__ = ["RESULTS", "Experiment", "provenance"]

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "../src") else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
    }


class Experiment:
    """Rows of one model, each written to its file as soon as it is there, with the commit that measured it."""

    def __init__(self, kind: str, arguments: Namespace):
        self.source = open_source(model_folder(arguments.model))
        counts = {role: getattr(arguments, role) for role in ("calibration", "search", "test")}
        self.blocks = blocks = texts(arguments.model, self.source.tokenizer(), **counts)
        self.reference = Reference.of(self.source.load(), blocks.test)
        self.only = arguments.only
        self.file = RESULTS / f"{kind}-{arguments.model}.json"
        counts["test"] = len(blocks.test.ids)
        nll = self.reference.nll.double().mean()
        self.result = {
            "model": arguments.model,
            "parameters": parameter_count(self.source),
            "text": {"test": blocks.test.source, "calibration": blocks.calibration.source},
            "sequences": counts,
            "seq_len": MODELS[arguments.model].seq_len,
            **provenance(),
            "original": {"nll": float(nll), "perplexity": float(nll.exp())},
            "rows": self._kept(counts) if self.only and self.file.exists() else {},
        }

    def _kept(self, counts: dict[str, int]) -> dict:
        """The rows there; they must have been measured on as much text."""
        kept = json.loads(self.file.read_text())
        if not kept["sequences"].items() <= counts.items():
            raise SystemExit(
                f"{self.file}: its rows have {kept['sequences']}, not {counts}; give the same, or no --only"
            )
        return kept["rows"]

    @staticmethod
    def parser(description: str | None, *, calibration: int, search: int, test: int) -> ArgumentParser:
        parser = ArgumentParser(description=description)
        parser.add_argument("model", choices=MODELS)
        for role, count in (("calibration", calibration), ("search", search), ("test", test)):
            parser.add_argument(f"--{role}", type=int, default=count, help=f"sequences for {role}, {count} by default")
        parser.add_argument("--only", default="", help="rows that this expression finds; others stay as they were")
        return parser

    def quantize(
        self, recipe: Recipe, slopes: Sensitivity | None = None
    ) -> tuple[dict, Plan, PreTrainedModel, list[LayerReport]]:
        """-> scores, stored bits and seconds; the plan, the quantized model and what was noted about each weight."""
        start = time.time()
        plan = decide(self.source, recipe, self.blocks, None, Monitor(), "cpu", slopes)
        decided = time.time()
        model, reports = execute(self.source, plan, self.blocks, None, Monitor(), "cpu")
        seconds = {"decide": round(decided - start, 1), "execute": round(time.time() - decided, 1)}
        score = evaluate(model, self.blocks.test, self.reference).to_dict()
        return score | {"bits": quantized_bits(plan, self.source), "seconds": seconds}, plan, model, reports

    def row(self, name: str, measure: Callable[[], dict | None]) -> None:
        """Measures and keeps a row that --only asks for; none where a method cannot do it, or has nothing to say."""
        if not re.search(self.only, name):
            return
        try:
            row = measure()
        except PaleyError as error:
            print(f"{name}: {error}", flush=True)
            return
        if row is None:
            return
        self.result["rows"][name] = row | {"commit": self.result["commit"]}
        print(f"{name:40s} {row['bits']:.3f} bits  gap {row['gap']:.4f} ± {row['gap_stderr']:.4f}  KL {row['kl']:.4f} "
              f"± {row['kl_stderr']:.4f}  {row['seconds']} s", flush=True)  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.result, indent=1) + "\n")
