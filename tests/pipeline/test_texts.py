"""The texts of a run's three roles, and that a score outside a run is on the text of the run's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.pipeline import texts
from paley.recipe import Recipe, apply_settings, preset
from tiny_models import save_tiny


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three texts of 40 documents."""
    made = []
    for name in "abc":
        file = tmp_path / f"{name}.txt"
        file.write_text("\n<|endoftext|>\n".join(f"{name}{i} " * 40 for i in range(40)))
        made.append(str(file))
    return made


def recipe(name: str, *settings: str) -> Recipe:
    sizes = [f"{part}.{size}" for part in ("calibration", "search", "test") for size in ("sequences=2", "seq_len=32")]
    return apply_settings(preset(name), [*sizes, *settings])


@pytest.mark.parametrize(
    ("name", "settings", "split"),
    [
        ("w4a4kv4", [], True),
        ("w4a4kv4", ["test.source=B"], False),
        ("gbs-w4a4kv4", ["test.source=B", "search.source=B"], True),
        # Also where nothing is tuned: all methods are scored on the same text.
        ("gbs-w4a4kv4", ["test.source=B", "search.source=B", "search.method=none"], True),
        ("rtn-w4a16", [], True),
        ("rtn-w4a16", ["test.source=B"], False),
        ("higgs-4", ["test.source=B", "budget={weights: 4, source: B}"], True),  # slopes are measured on a part
    ],
)
def test_the_score_of_a_run_is_on_test_blocks(files, tiny_tokenizer, name, settings, split):
    settings = [s.replace("=B", f"={files[1]}").replace(" B}", f" {files[1]}}}") for s in settings]
    made = recipe(name, f"calibration.source={files[0]}", *settings)
    embedding = SimpleNamespace(shape=(len(tiny_tokenizer), 8))
    source: Any = SimpleNamespace(tokenizer=lambda: tiny_tokenizer, sites=SimpleNamespace(embedding=embedding))
    blocks = texts.test_blocks(made, tiny_tokenizer)
    assert blocks.sha256 == texts.gather(made, source).test.sha256
    start = tiny_tokenizer.decode(blocks.ids[0][1:4])
    assert start.startswith("b" if made.test.source else "a")
    assert (start[1:] != "0 ") == split


def test_a_file_is_known_by_any_of_its_names(files, tmp_path, monkeypatch):
    made = recipe("gbs-w4a4kv4", f"calibration.source={files[0]}", f"search.source={files[1]}")
    (tmp_path / "link.txt").symlink_to(files[0])
    monkeypatch.chdir(tmp_path)
    for source, tuned in (
        (files[0], True),
        ("a.txt", True),
        ("link.txt", True),
        ("b.txt", True),
        ("c.txt", False),
        ("pydoc", False),
        ("none.txt", False),
    ):
        assert texts.is_tuned_on(made, source) == tuned, source
    assert texts.is_tuned_on(recipe("w4a4kv4"), "pydoc")
    for name, settings, tuned in (
        ("rtn-w4a4kv4", [], False),
        ("rtn-w4a4kv4", ["overrides=[{pattern: '*', weight: {grid: int4}}]"], True),  # by GPTQ
        ("w4a16", [], True),
        ("w16a16", [], False),
        ("w16a16kv4", ["search.method=none"], True),  # mean keys are calibrated
        ("w16a16kv4", ["search.method=none", "center_keys=false"], False),
        ("higgs-4", ["budget={weights: 4, source: pydoc}"], True),
    ):
        assert texts.is_tuned_on(recipe(name, *settings), "pydoc") == tuned, (name, settings)


def test_text_that_the_model_wrote_itself_is_no_test(tiny_tokenizer):
    with pytest.raises(PaleyError, match="the model wrote itself"):
        texts.test_blocks(recipe("w4a4kv4", "calibration.source=self"), tiny_tokenizer)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], False),
        (
            [
                {"pattern": "*", "weight": {"grid": "int6", "method": "nearest"}},
                {"pattern": "*down*", "input": {"grid": "int7"}},
            ],
            True,
        ),
        ([{"pattern": "*", "weight": {"grid": "int6", "method": "nearest"}}], False),
    ],
)
def test_a_diagonal_that_overrides_ask_for_together_needs_a_text(overrides, wanted):
    made = Recipe.model_validate(
        {
            "weights": {"grid": "int3", "method": "nearest"}, "inputs": {"grid": "int8"}, "diagonal": "auto",
            "search": {"method": "none"}, "overrides": overrides,
        }
    )  # fmt: skip
    assert texts.calibrates(made) == wanted


def test_a_resumed_run_takes_the_text_that_it_had_sampled(tmp_path, tiny_tokenizer, monkeypatch):
    source = open_source(save_tiny(tmp_path / "model", tiny_tokenizer, dtype=torch.bfloat16))
    made = recipe("gbs-w4a4kv4", "calibration.source=self", "test=null")
    run: Any = SimpleNamespace(path=tmp_path)
    first = texts.gather(made, source, run=run)
    assert first.calibration is not None
    assert first.search is not None
    assert first.calibration.sha256 == texts.gather(made, source).calibration.sha256 != first.search.sha256
    monkeypatch.setattr(texts, "sample_documents", None)
    again = texts.gather(made, source, run=run)
    assert [b.sha256 for b in again.all()] == [b.sha256 for b in first.all()]
    assert [b.role for b in again.all()] == ["calibration", "search"]
