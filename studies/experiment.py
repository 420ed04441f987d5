"""What the studies share: a model with text in three roles, the original's score, and a JSON file of rows."""

from __future__ import annotations

import json
import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from bench.record import provenance, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paley.core.errors import PaleyError
from paley.data import Role, TokenBlocks, check_disjoint, token_blocks
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.calibrate import LayerReport
from paley.model.loading import open_source
from paley.model.problem import Problem
from paley.model.reading import prepare_
from paley.pipeline.accounting import parameter_count, quantized_bits
from paley.pipeline.decide import Decision, decide
from paley.pipeline.execute import execute
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.pipeline.texts import Texts
from paley.recipe import Recipe
from paley.sensitivity import Sensitivity

__all__ = [
    "BLOCKS_ALONE",
    "RESULTS",
    "Experiment",
    "Quantization",
    "Subject",
    "measured",
    "named",
    "provenance",
    "read",
    "save",
]

RESULTS = Path(__file__).parent / "results"
# Suffix of presets in studies that compare methods at equal bits of the blocks: embedding and head keep 16 bits.
BLOCKS_ALONE = "e16h16"


def read(name: str, folder: Path = RESULTS) -> dict | None:
    """The content of a file of results; None where it is missing."""
    file = folder / name
    return json.loads(file.read_text()) if file.exists() else None


def measured(kind: str) -> dict[str, dict]:
    """Model -> content of results/KIND-MODEL.json, by name."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{kind}-*.json"))}
    return {r["model"]: r for name, r in found.items() if name == f"{kind}-{r.get('model')}"}


@dataclass(frozen=True)
class Subject:
    """A model, and so many sequences of text in each role; without a test text of its own, text is split by role."""

    model: str
    text: str
    test_text: str | None
    seq_len: int
    calibration: int
    search: int
    test: int

    @staticmethod
    def parser(description: str | None, *, calibration: int, search: int, test: int) -> ArgumentParser:
        parser = ArgumentParser(description=description)
        parser.add_argument("model", help="checkpoint folder, as assets/demo-model or one from bench/models.py")
        parser.add_argument("--text", default="pydoc", help="a file, hub:DATASET or pydoc (Python's documentation)")
        parser.add_argument("--test-text", help="text to score on; a part of --text by default")
        parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence, 256 by default")
        for role, count in (("calibration", calibration), ("search", search), ("test", test)):
            parser.add_argument(f"--{role}", type=int, default=count, help=f"sequences for {role}, {count} by default")
        return parser

    @classmethod
    def of(cls, arguments: Namespace) -> Subject:
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    @property
    def name(self) -> str:
        return Path(self.model).name

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Texts:
        def blocks(role: Role) -> TokenBlocks | None:
            own, count = self.test_text if role == "test" else None, getattr(self, role)
            return token_blocks(
                own or self.text, tokenizer, role=role, count=count, seq_len=self.seq_len, whole=own is not None
            ) if count else None  # fmt: skip

        found = Texts(blocks("calibration"), blocks("search"), blocks("test"))
        check_disjoint(*found.all())
        return found


@dataclass(frozen=True)
class Quantization:
    """row: scores, stored bits and seconds. problem: with the decided schemes, which `model` has."""

    row: dict
    problem: Problem
    decision: Decision
    model: PreTrainedModel
    reports: list[LayerReport]

    def rel_errors(self) -> dict[str, float]:
        return {report.name: report.rel_error for report in self.reports}


class Experiment:
    """Rows of one model, each written to its file as soon as it is there, with the commit that measured it."""

    def __init__(self, kind: str, arguments: Namespace):
        subject = Subject.of(arguments)
        self.source = open_source(subject.model)
        self.blocks = blocks = subject.texts(self.source.tokenizer())
        self.reference = Reference.of(self.source.load(), blocks.test)
        self.only = getattr(arguments, "only", "")
        self.file = RESULTS / f"{kind}-{subject.name}.json"
        counts = {role: getattr(subject, role) for role in ("calibration", "search", "test")}
        nll = self.reference.nll.double().mean()
        self.result = {
            "model": subject.name,
            "parameters": parameter_count(self.source),
            "text": {"test": named(blocks.test.source), "calibration": named(subject.text)},
            "sequences": counts,
            "seq_len": subject.seq_len,
            **provenance(),
            "original": {"nll": float(nll), "perplexity": float(nll.exp())},
        }
        self.result["rows"] = self._kept() if self.only and self.file.exists() else {}

    def _kept(self) -> dict:
        """The rows there; they must have been measured on the same text, and as much of it."""
        kept = json.loads(self.file.read_text())
        for key in ("text", "sequences", "seq_len"):
            if kept[key] != self.result[key]:
                raise SystemExit(
                    f"{self.file}: its rows have {key} {kept[key]}, not {self.result[key]}; give the same, or no --only"
                )
        return kept["rows"]

    @staticmethod
    def parser(description: str | None, *, calibration: int, search: int, test: int) -> ArgumentParser:
        parser = Subject.parser(description, calibration=calibration, search=search, test=test)
        parser.add_argument("--only", default="", help="rows that this expression finds; others stay as they were")
        return parser

    def quantize(self, recipe: Recipe, slopes: Sensitivity | None = None) -> Quantization:
        """slopes: what a recipe with a budget goes by; measured unless given."""
        start = time.time()
        problem = resolve(self.source, recipe)
        decision = decide(problem, self.blocks, None, Monitor(), "cpu", slopes)
        problem = problem.with_schemes(decision.schemes)
        decided = time.time()
        made = execute(problem, self.blocks.calibration, None, Monitor(), "cpu")
        model, reports = made.model, made.reports
        prepare_(model, "dense", torch.float32)  # else weights are decoded for each piece of text
        seconds = {"decide": round(decided - start, 1), "execute": round(time.time() - decided, 1)}
        score = evaluate(model, self.blocks.test, self.reference).to_dict()
        row = score | {"bits": quantized_bits(problem), "seconds": seconds}
        return Quantization(row, problem, decision, model, reports)

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
        source = {"source": named(row["source"])} if "source" in row else {}
        self.result["rows"][name] = row | source | {"commit": self.result["commit"]}
        print(f"{name:40s} {row['bits']:.3f} bits  gap {row['gap']:.4f} ± {row['gap_stderr']:.4f}  KL {row['kl']:.4f} "
              f"± {row['kl_stderr']:.4f}  {row['seconds']} s", flush=True)  # fmt: skip
        save(self.result, self.file)


def named(source: str) -> str:
    """A file by its name alone: rows say nothing of the machine's folders."""
    return Path(source).name if Path(source).exists() else source
