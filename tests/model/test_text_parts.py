"""The language model inside a vision-language checkpoint predicts what the whole model predicts of text."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

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
    "qwen3_vl_moe": {
        "text_config": TEXT
        | MROPE
        | {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
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


NO_TEXT = {
    "clip": r"the text part of this clip model is a clip_text_model, which has no causal language model",
    "vit": "a vit model has no causal language model", "t5": "a t5 model has no causal language model",
    "wav2vec2": "a wav2vec2 model has no causal language model",
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_text_part_that_is_no_causal_model_is_named(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    save_file({"text_model.layers.11.a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaleyError, match=f"{NO_TEXT[kind]}.*; give the folder of a model"):
        open_source(tmp_path)


AUDIO = {
    "qwen2_audio": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "audio_config": {
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
            "max_source_positions": 20,
        },
    },
    "voxtral": {
        "text_config": TEXT | {"model_type": "llama"},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_mel_bins": 8, "max_source_positions": 20,
        },
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", AUDIO)
def test_the_text_part_of_a_model_that_hears(tmp_path, kind):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **AUDIO[kind])).eval()
    model.save_pretrained(tmp_path)
    whole = model.language_model if hasattr(model, "language_model") else model
    if not hasattr(whole, "lm_head"):  # the bare model, whose files have no head
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["language_model.lm_head.weight"] = head = torch.randn(260, 48)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        expected = whole(input_ids=IDS).last_hidden_state @ head.T
    else:
        expected = whole(input_ids=IDS).logits
    torch.testing.assert_close(open_source(tmp_path).load()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
