"""The language model inside a vision-language checkpoint predicts what the whole model predicts of text."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import paley
from paley.core.errors import PaleyError
from paley.model.loading import open_source
from paley.pipeline import quantize
from tiny_models import higgs

TEXT = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [2, 2, 2]}}
SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = SEEING | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
IDS = torch.tensor([[7, 19, 250, 33, 8, 4, 90, 91, 92, 17]])
MODELS = {
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 12},
        "vision_config": SEEING | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
        "image_token_index": 10,
    },
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SIGLIP, "image_token_index": 10},
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 4},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 10,
    },
    "qwen2_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"embed_dim": 16, "hidden_size": 48}, "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": QWEN | {"hidden_size": 16, "out_hidden_size": 48, "intermediate_size": 16},
        "tie_word_embeddings": True,
    },
    "qwen3_vl": {
        "text_config": TEXT | MROPE | {"head_dim": 12},
        "vision_config": QWEN
        | {"hidden_size": 16, "out_hidden_size": 48, "intermediate_size": 16, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS)
def saved(request, tmp_path, tiny_tokenizer):
    """-> (folder, logits of the whole model)."""
    torch.manual_seed(0)
    settings = MODELS[request.param]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(request.param, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        return tmp_path / "whole", model(input_ids=IDS).logits


@torch.no_grad()
def test_the_text_part_predicts_the_same_and_is_quantized(saved, tmp_path):
    folder, expected = saved
    source = open_source(folder)
    assert source.extra
    assert any("text part" in note for note in source.notes)
    torch.testing.assert_close(source.load()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    out = quantize(folder, higgs(name="higgs-4"), output=tmp_path / "out").output
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == source.config.model_type
    assert config["architectures"] == [type(source.skeleton).__name__]
    assert "vision_config" not in config
    loaded = paley.load(out)
    assert type(loaded).__name__ == type(source.skeleton).__name__
    assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("prefix", ["language_model.model.", "text_model.", "a.b.c.", ""])
def test_any_prefix_is_found(saved, prefix):
    folder, expected = saved
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = next(name for name in tensors if name.endswith("norm.weight") and "layers" not in name and "vis" not in name)
    stored = norm.removesuffix("norm.weight")
    renamed = {name.replace(stored, prefix) if name.startswith(stored) else name: t for name, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(open_source(folder).load()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_text_part_that_is_no_causal_model_is_named(tmp_path):
    config = AutoConfig.for_model("clip")
    config.save_pretrained(tmp_path)
    save_file({"text_model.layers.11.a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaleyError, match=r"clip.* no causal language model.*; give the folder of a model"):
        open_source(tmp_path)
