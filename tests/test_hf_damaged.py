"""Outlier columns that name no columns, or one twice, are refused where transformers loads the file."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import paley
from paley import hf
from paley.core.errors import PaleyError
from paley.core.schemes import LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.format.spec import QuantizationConfig
from paley.methods.gptq import quantize_gptq
from paley.methods.statistics import InputStatistics
from paley.model.linear import QuantLinear

DOWN = "model.layers.0.mlp.down_proj"
COLUMNS = f"{DOWN}.outlier_columns"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def loads(folder):
    """Each way to load the folder."""
    hf.register()
    return [lambda: paley.load(folder), lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)]


@pytest.fixture
def checkpoint(tmp_path):
    """-> the folder of a model whose layer DOWN reads 48 values, three of them outliers, and the model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            initializer_range=0.3, architectures=["LlamaForCausalLM"],
        )
    ).eval()  # fmt: skip
    weight, statistics, linear = WeightScheme("int3", 16), InputStatistics(), model.get_submodule(DOWN)
    scheme = LinearScheme(weight, transform=Transform(40, 48, 12), outliers=3)
    linear.weight, linear.in_features = nn.Parameter(scheme.transform.apply(linear.weight.data)), 48
    statistics.add(torch.eye(48), torch.eye(48))
    q = quantize_gptq(linear.weight.data, statistics, weight, outlier_columns=torch.tensor([2, 31, 47]).int())
    layer = QuantLinear.from_linear(linear, scheme, q)
    layer.prepare_("dense")  # as the folder is loaded, to the bit
    model.set_submodule(DOWN, layer)
    section = QuantizationConfig(linears={DOWN: scheme}, attentions={}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": section}))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, model


@torch.no_grad()
def test_columns_of_the_widened_input_are_taken(checkpoint):
    folder, model = checkpoint
    for load in loads(folder):
        loaded = load()
        assert loaded.get_submodule(DOWN).outlier_columns.tolist() == [2, 31, 47]
        want = model(IDS).logits
        assert float((loaded(IDS).logits - want).norm()) < 0.05 * float(want.norm())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([2, 31, 48], "must ascend within 48 columns; the file is damaged"),
        ([2, 31, 2**31 - 1], "must ascend within 48 columns"),
        ([-1, 31, 47], "must ascend within 48 columns"),
        ([-(2**31), 31, 47], "must ascend within 48 columns"),
        ([2, 2, 47], "must ascend within 48 columns"),
        ([31, 2, 47], "must ascend within 48 columns"),
        ([2, 31], r"has shape \(2,\), must have \(3,\)"),
        ([2.0, 31.0, 47.0], r"is torch\.float32, must be torch\.int32"),
    ],
)
def test_damaged_outlier_columns_are_refused(checkpoint, columns, message):
    folder, _ = checkpoint
    tensors = load_file(folder / "model.safetensors")
    damaged = torch.tensor(columns, dtype=torch.float32 if isinstance(columns[0], float) else torch.int32)
    save_file(tensors | {COLUMNS: damaged}, folder / "model.safetensors", metadata={"format": "pt"})
    for load in loads(folder):
        with pytest.raises(PaleyError, match=rf"{re.escape(str(folder))}.*: {COLUMNS}:? {message}"):
            load()
