"""The original model's folder, opened and refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from family_configs import CONFIGS
from paley.core.errors import PaleyError
from paley.model.folders import load_tokenizer
from paley.model.loading import empty_model, open_source, plain_attention
from paley.pipeline.accounting import parameter_count
from tiny_models import EMBEDDING, HEAD, save_tiny, store_tie_as


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


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (HEAD, EMBEDDING)])
def test_a_tied_pair_may_be_stored_under_either_name_or_both(tmp_path, tiny_tokenizer, names):
    source = open_source(store_tie_as(save_tiny(tmp_path, tiny_tokenizer, qwen=True), *names))
    assert source.skeleton.lm_head.weight is source.skeleton.model.embed_tokens.weight
    model = source.load()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, source.checkpoint[EMBEDDING])
    assert HEAD not in source.checkpoint
    assert parameter_count(source) == sum(p.numel() for p in model.parameters())


def test_a_tied_pair_that_is_not_there_is_missed(tmp_path, tiny_tokenizer):
    source = open_source(save_tiny(tmp_path, tiny_tokenizer, qwen=True))
    store_tie_as(tmp_path)
    with pytest.raises(PaleyError, match=f"no tensor '{EMBEDDING}'"):
        open_source(tmp_path)
    with pytest.raises(PaleyError, match="became shorter while it was read"):
        source.load()


def test_a_head_of_its_own_needs_its_weight_and_the_embedding_too(tmp_path, tiny_tokenizer):
    store_tie_as(save_tiny(tmp_path, tiny_tokenizer), HEAD)
    with pytest.raises(PaleyError, match=f"no tensor '{EMBEDDING}'"):
        open_source(tmp_path)


@pytest.mark.parametrize(("kind", "attention"), [("gemma2", "eager"), ("gpt_oss", "eager"), ("llama", "sdpa")])
def test_soft_caps_and_sinks_are_computed_plainly(kind, attention):
    """transformers' sdpa attention passes over both, and its releases before 5.21 took it for Gemma 2 by default."""
    assert plain_attention(AutoConfig.for_model(kind)) == attention
    assert empty_model(CONFIGS[kind]()).config._attn_implementation == attention
