"""Folders and a page that the tests of reports read; no test changes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import paley
from command_line import paley_
from paley.recipe import apply_settings
from paley.report import gather, write_page
from tiny_models import save_tiny

SIZES = [f"{part}.{key}" for part in ("calibration", "search", "test") for key in ("sequences=2", "seq_len=48")]


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_tokenizer) -> SimpleNamespace:
    """A model whose clip ratios were searched, its slopes, its speed, and the report of all: no figure is missing."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} is a <number> & {n * n} is its square." for n in range(900)))
    model = save_tiny(folder / "model", tiny_tokenizer)
    search = ["search.method=gbs", "search.iterations=2", "weights.group_size=null", f"calibration.source={text}"]
    paley.quantize(model, apply_settings(paley.preset("rtn-w4a4kv4"), [*search, *SIZES]), output=folder / "out")
    alpha = folder / "alpha.json"
    slopes = paley.measure_sensitivity(model, source=str(text), sequences=2, seq_len=32)
    alpha.write_text(json.dumps(slopes.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paley.pipeline.bench._BYTES", 2**20)
        bench = ["bench", folder / "out", "--prompt-tokens", 8, "--new-tokens", 2, "--rounds", 1, "--threads", 1]
        (folder / "speed.json").write_text(paley_(*bench, "--against", "bf16", "--json").out)
    report = gather(folder / "out", model, sensitivity=alpha, speed=folder / "speed.json")
    return SimpleNamespace(
        folder=folder, model=model, out=folder / "out", alpha=alpha, speed=folder / "speed.json", report=report
    )


@pytest.fixture(scope="session")
def unscored(made) -> Path:
    paley.quantize(
        made.model, apply_settings(paley.preset("rtn-w4a16"), ["test=null"]), output=made.folder / "unscored"
    )
    return made.folder / "unscored"


@pytest.fixture(scope="session")
def page_file(made) -> Path:
    file = made.folder / "page.html"
    write_page([made.report], file)
    return file
