"""The original model's folder, opened and refused."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.model.loading import load_tokenizer, open_source


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    config = LlamaConfig(
        vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_source_has_the_tokenizer_of_its_folder(folder, tiny_tokenizer):
    ids = tiny_tokenizer("three bits")["input_ids"]
    assert load_tokenizer(folder)("three bits")["input_ids"] == ids
    assert open_source(folder).tokenizer()("three bits")["input_ids"] == ids


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_missing_or_damaged_tokenizer_is_named(folder, content):
    source = open_source(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    for load in (lambda: load_tokenizer(folder), source.tokenizer):
        with pytest.raises(PaleyError, match=f"{folder}: no tokenizer can be loaded here"):
            load()
