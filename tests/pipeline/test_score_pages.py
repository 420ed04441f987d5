"""`paley.score` with a block in memory at a time: the same figures."""

import pytest

import paley
from paley.model.loading import open_source
from paley.pipeline import score as scores
from paley.pipeline.worker_memory import pages_pay
from tiny_models import higgs, save_tiny

LENGTHS = {"sequences": 4, "seq_len": 24}


@pytest.mark.parametrize("name", ["higgs-4", "higgs-w4a4kv4", "original"])
def test_the_figures_are_those_of_the_whole_model(tmp_path, tiny_tokenizer, monkeypatch, name):
    original = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    folder, found = original, []
    if name != "original":
        folder = tmp_path / "out"
        paley.quantize(original, higgs(name=name), output=folder)
    for pays in (True, False):
        opened = []
        monkeypatch.setattr(scores, "pages_pay", lambda *_, pays=pays: pays)
        whole = scores.load_any
        monkeypatch.setattr(scores, "load_any", lambda *a, opened=opened, whole=whole: opened.append(a) or whole(*a))
        found.append(paley.score(folder, original, data="pydoc", **LENGTHS))
        monkeypatch.undo()
        assert len(opened) == (0 if pays else 2)
    assert found[0] == found[1]
    assert found[0].kl == 0 if name == "original" else found[0].kl > 0


def test_a_long_text_holds_more_than_a_small_model(tmp_path, tiny_tokenizer):
    sites = open_source(save_tiny(tmp_path / "model", tiny_tokenizer)).sites
    assert pages_pay(sites, 24)
    assert not pages_pay(sites, 200 * 24)
