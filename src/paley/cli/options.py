"""The arguments and options of the verbs, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paley.cli.process import UsageError

__all__ = [
    "Against",
    "AnyFolder",
    "AnyModel",
    "Base",
    "Calibration",
    "ChatFlag",
    "ChatModel",
    "Data",
    "Device",
    "DrawSeed",
    "DryRun",
    "Dtype",
    "Exact",
    "Expand",
    "Folder",
    "Gguf",
    "Grid",
    "Json",
    "KvBpw",
    "Limit",
    "MaxNewTokens",
    "MinP",
    "Model",
    "NewFolder",
    "NewFolderOrNone",
    "NewTokens",
    "NoScore",
    "Overwrite",
    "PlanFile",
    "Preset",
    "Prompt",
    "PromptTokens",
    "Ray",
    "RayAddress",
    "RecipeFile",
    "RepetitionPenalty",
    "Resume",
    "Rivals",
    "Rounds",
    "Seed",
    "Sensitivity",
    "SeqLen",
    "Sequences",
    "Settings",
    "Stop",
    "System",
    "TargetBpw",
    "TargetBpws",
    "TargetSize",
    "TaskData",
    "Tasks",
    "Temperature",
    "Test",
    "Threads",
    "TopK",
    "TopP",
    "Tune",
    "WeightsOnly",
    "Workers",
    "cluster",
]

_HOW, _TEXT = "What to do", "Texts"
_SOURCES = "a file, pydoc, hub:DATASET[:CONFIG][:SPLIT]"


def _argument(metavar: str, text: str):
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _option(name: str, text: str, metavar: str | None = None, panel: str | None = None, **limits: float):
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, **limits)  # type: ignore[arg-type]


def _needed(ctx: typer.Context, value: Path | None) -> Path | None:
    """Raises if the folder is missing that everything but a dry run needs."""
    if value is None and not ctx.params.get("dry_run"):
        raise UsageError("Missing option '--output'", ctx)
    return value


Model = Annotated[str, _argument("MODEL", "The original model: a folder, a Hub name (owner/name), or a GGUF file.")]
AnyModel = Annotated[str, _argument("OUT", "A quantized folder, or any model.")]
Folder = Annotated[Path, _argument("OUT", "A folder that `paley quantize` wrote.")]
AnyFolder = Annotated[Path | None, _argument("[OUT]", "A folder that `paley quantize` wrote.")]
ChatModel = Annotated[str, _argument("OUT", "A quantized folder, or any model, that was trained to answer.")]
Prompt = Annotated[str, _argument("PROMPT", "The text to continue; - reads it from stdin.")]

Preset = Annotated[str | None, _option("--preset", "A packaged recipe; see `paley presets`.", "NAME", _HOW)]
RecipeFile = Annotated[Path | None, _option("--recipe", "Your own recipe, YAML or JSON.", "FILE", _HOW)]
Base = Annotated[
    Path | None,
    _option("--from", "Keep this folder's weights, byte by byte, where their scheme is the same.", "OUT", _HOW),
]
Exact = Annotated[
    bool,
    _option("--exact", "Of --from: only what a run from the beginning would make the same.", panel=_HOW),
]
PlanFile = Annotated[Path | None, _option("--plan", "What `paley plan` decided.", "FILE", _HOW)]
Settings = Annotated[
    list[str] | None,
    _option("--set", "Changes to the recipe: search.sequences=8 inputs.clip_ratio=0.9", "KEY=VALUE ...", _HOW),
]
Tune = Annotated[
    bool, _option("--tune", "Tune scales, norms and biases afterwards, on the original's predictions.", panel=_HOW)
]
Grid = Annotated[
    str | None,
    _option(
        "--grid",
        "The weights' grid: p2n256, gauss3, ..., or a .safetensors file of points.",
        "NAME",
        _HOW,
    ),
]
_BUDGET, _CLUSTER = "Under a budget", "On several machines"
TargetBpw = Annotated[str | None, _option("--target-bpw", "Stored bits for each weight, on average.", "BITS", _BUDGET)]
TargetBpws = Annotated[
    str | None,
    _option("--target-bpw", "Stored bits for each weight; several, 2.5,3,4, print a curve.", "BITS,...", _BUDGET),
]
TargetSize = Annotated[str | None, _option("--target-size", "Of all tensors on disk: 4GB, 3.5GiB.", "SIZE", _BUDGET)]
KvBpw = Annotated[float | None, _option("--kv-bpw", "Bits for each cached key and value, on average.", "BITS", _BUDGET)]
Sensitivity = Annotated[
    Path | None,
    _option("--sensitivity", "What `paley sensitivity` measured; without it, measured now.", "FILE", _BUDGET),
]
Expand = Annotated[str | None, _option("--expand", "Dimensions that the residual stream gains.", "N|auto", _HOW)]
Seed = Annotated[int | None, _option("--seed", "Draws rotations and calibration text.", panel=_HOW)]
Calibration = Annotated[
    str | None,
    _option("--calibration", f"Text to calibrate on: {_SOURCES}, or self (sampled).", "SOURCE", _TEXT),
]
Test = Annotated[
    str | None,
    _option("--test", "Text to score on; without it, a part of the calibration's.", "SOURCE", _TEXT),
]

NoScore = Annotated[
    bool,
    _option("--no-score", "Score nothing: quicker, and with data-free recipes for models of any size.", panel=_TEXT),
]

NewFolder = Annotated[Path, typer.Option("--output", help="The new folder.", show_default=False)]
NewFolderOrNone = Annotated[
    Path | None,
    typer.Option("--output", help="The new folder; required, but for --dry-run.", show_default=False, callback=_needed),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only estimate time, memory and size here, and make nothing.", is_eager=True),
]
Device = Annotated[str, _option("--device", "cpu or cuda.")]
Workers = Annotated[int, _option("--workers", "Processes that share what can be shared.", min=1)]
Ray = Annotated[bool, _option("--ray", "Share it by Ray, started here with --workers processes.", panel=_CLUSTER)]
RayAddress = Annotated[
    str | None,
    _option("--ray-address", "Share it by this Ray cluster; auto: the one here.", "HOST:PORT", _CLUSTER),
]
Resume = Annotated[bool, _option("--resume", "Go on with a run that was stopped.")]
Overwrite = Annotated[bool, _option("--overwrite", "Make it anew, and replace what is there.")]
Json = Annotated[bool, _option("--json", "Print one JSON object and nothing else.")]

_ANSWERS = "Tasks"
Against = Annotated[str | None, _option("--against", "The original, for KL divergence and agreement.", "MODEL")]
Data = Annotated[str | None, _option("--data", f"Text: {_SOURCES}.", "SOURCE")]
Sequences = Annotated[int | None, _option("--sequences", "How many sequences.", min=1)]
Tasks = Annotated[
    str | None,
    _option("--tasks", "arc_easy, arc_challenge, hellaswag, lambada_openai, piqa, winogrande.", "NAME,...", _ANSWERS),
]
TaskData = Annotated[Path | None, _option("--task-data", "The folder with their files.", "FOLDER", _ANSWERS)]
Limit = Annotated[int | None, _option("--limit", "Only so many documents of each task.", None, _ANSWERS, min=1)]
SeqLen = Annotated[int | None, _option("--seq-len", "Tokens of each.", min=2)]

_DRAW = "How tokens are drawn"
MaxNewTokens = Annotated[int, _option("--max-new-tokens", "Stop after so many.", min=1)]
Temperature = Annotated[float, _option("--temperature", "0: the most likely token each time.", None, _DRAW, min=0)]
TopK = Annotated[int, _option("--top-k", "Among so many of the most likely; 0: all.", None, _DRAW, min=0)]
TopP = Annotated[float, _option("--top-p", "Among the fewest whose chances reach this together.", None, _DRAW)]
MinP = Annotated[float, _option("--min-p", "Among those with this part of the largest chance.", None, _DRAW)]
RepetitionPenalty = Annotated[
    float, _option("--repetition-penalty", "Above 1: tokens of prompt and answer become less likely.", None, _DRAW)
]
DrawSeed = Annotated[int, _option("--seed", "Draws the tokens at temperatures above 0.", panel=_DRAW)]
Stop = Annotated[
    list[str] | None, _option("--stop", "A text that ends the answer; may be given several times.", "TEXT")
]
ChatFlag = Annotated[bool, _option("--chat", "The prompt is a question: put the model's chat template around it.")]
System = Annotated[str | None, _option("--system", "What the model is told before a chat begins.", "TEXT")]

WeightsOnly = Annotated[
    bool,
    _option("--weights-only", "Leave out the rounding of inputs, keys and values, which an ordinary model cannot do."),
]
Dtype = Annotated[
    str | None, _option("--dtype", "Of the weights: float16, bfloat16 or float32; the folder's own.", "DTYPE")
]

_BENCH = "What is measured"
Rivals = Annotated[
    str | None, _option("--against", "bf16, transformers, llama.cpp: in the same run.", "NAME,...", _BENCH)
]
Gguf = Annotated[Path | None, _option("--gguf", "The same model for llama.cpp.", "FILE", _BENCH)]
PromptTokens = Annotated[int, _option("--prompt-tokens", "Tokens of the prompt.", "N", _BENCH)]
NewTokens = Annotated[int, _option("--new-tokens", "Tokens read one by one.", "N", _BENCH)]
Rounds = Annotated[int, _option("--rounds", "Rounds, after one that warms up.", "N", _BENCH)]
Threads = Annotated[int | None, _option("--threads", "Threads; as many as PyTorch takes by default.", "N", _BENCH)]


def cluster(ray: bool, address: str | None) -> str | None:
    """What --ray and --ray-address say together, as of `paley.quantize`."""
    return address or ("local" if ray else None)
