"""Folders for compressed-tensors and MLX: their own packages decode the values that Paley decodes, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import paley
from paley.core import packing
from paley.core.errors import PaleyError
from paley.export.compressed_tensors import export_compressed_tensors
from paley.export.formats import FORMATS, export_to
from paley.export.mlx import export_mlx
from paley.export.recode import words
from paley.format.checkpoint import Checkpoint
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

IDS = torch.arange(3, 40)[None]
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module", params=["llama", "qwen2 tied"])
def model(request, tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny(folder, tiny_tokenizer, qwen=request.param.startswith("qwen2"), **SIZES)


def quantized(model: Path, out: Path, name: str, *settings: str) -> Path:
    recipe = apply_settings(preset(name), ["test=null", "weights.method=nearest", "dtype=float32", *settings])
    return paley.quantize(model, recipe, output=out).output


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def decoded(out: Path, tmp_path: Path) -> Checkpoint:
    """The values that Paley decodes."""
    return Checkpoint.open(paley.dequantize(out, output=tmp_path / "plain", dtype="float32").output)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("weights.grid=int3", "weights.group_size=32"),
        ("weights.grid=int5", "weights.group_size=null"),
        ('overrides=[{pattern: "*.1.mlp.*", keep: true}, {pattern: "*.0.mlp.*", weight: {grid: int8}}]',),
    ],
)
def test_compressed_tensors_gives_the_same_logits(model, settings, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    out = quantized(model, tmp_path / "out", "ct-w4g128", *settings)
    made = export_compressed_tensors(out, output=tmp_path / "ct")
    theirs = AutoModelForCausalLM.from_pretrained(made.output, dtype=torch.float32, local_files_only=True)
    want = logits(paley.load(out, product="dense"))
    assert (logits(theirs) - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_that_compressed_tensors_packs(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 77), generator=torch.Generator().manual_seed(0))
    theirs = helpers.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(words(packing.pack_codes(codes, 2**bits)), theirs)


def test_the_config_says_what_is_packed(model, tmp_path):
    out = quantized(model, tmp_path / "out", "ct-w4g128", 'overrides=[{pattern: "*.1.mlp.up_proj", keep: true}]')
    made = export_compressed_tensors(out, output=tmp_path / "ct")
    section = json.loads((made.output / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert section["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 128,
    }  # fmt: skip
    stored = Checkpoint.open(made.output)
    name = "model.layers.0.mlp.down_proj"
    assert stored.shape(f"{name}.weight_packed") == (128, 256 * 4 // 32)
    assert stored[f"{name}.weight_shape"].tolist() == [128, 256]
    assert made.bytes == stored.nbytes
    assert "`out`" in (made.output / "README.md").read_text()
    with pytest.raises(PaleyError, match="exists already"):
        export_compressed_tensors(out, output=tmp_path / "ct")


@pytest.mark.parametrize("settings", [(), ("weights.grid=int3", "weights.group_size=null"),
                                      ('overrides=[{pattern: "*.0.mlp.*", weight: {grid: int8}}]',)])  # fmt: skip
def test_the_section_is_what_readers_of_the_format_parse(settings, model, tmp_path):
    """vLLM 0.33 takes each group through QuantizationArgs, and wants integers, weights alone, by group or by row."""
    parsing = pytest.importorskip("compressed_tensors.quantization", reason="pip install compressed-tensors")
    made = export_compressed_tensors(quantized(model, tmp_path / "out", "ct-w4g128", *settings), output=tmp_path / "ct")
    section = json.loads((made.output / "config.json").read_text())["quantization_config"]
    parsed = parsing.QuantizationConfig.model_validate(section)
    assert parsed.format == section["format"] == "pack-quantized"
    assert parsed.kv_cache_scheme is None
    assert len(parsed.config_groups) == (2 if any("overrides" in text for text in settings) else 1)
    for group in section["config_groups"].values():
        weights = parsing.QuantizationArgs.model_validate(group["weights"])
        assert (weights.type, weights.symmetric, weights.dynamic) == (parsing.QuantizationType.INT, True, False)
        assert weights.strategy in (parsing.QuantizationStrategy.GROUP, parsing.QuantizationStrategy.CHANNEL)
        assert weights.actorder is None
        assert group["input_activations"] is None
        assert group["format"] == "pack-quantized"


def by_hand(stored: Checkpoint, name: str, bits: int, width: int) -> torch.Tensor:
    """MLX's affine mode: w = scale · code + bias, codes a stream of bits in words of 32."""
    packed = stored[f"{name}.weight"].view(torch.uint8)[:, : -(-width * bits // 8)]
    codes = packing.unpack(packed, bits, width).float()
    size = width // stored.shape(f"{name}.scales")[1]
    scales, biases = (stored[f"{name}.{part}"].float().repeat_interleave(size, 1) for part in ("scales", "biases"))
    return scales * codes + biases


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_mlx_has_the_same_matrices(model, bits, tmp_path):
    out = quantized(model, tmp_path / "out", f"mlx-{bits}")
    made = export_mlx(out, output=tmp_path / "mlx")
    stored, plain = Checkpoint.open(made.output), decoded(out, tmp_path)
    names = {"model.layers.0.mlp.down_proj": bits, "model.embed_tokens": max(6, bits)}
    for name, wanted in names.items():
        ours = plain[f"{name}.weight"]
        theirs = by_hand(stored, name, wanted, ours.shape[1])
        assert (theirs - ours).abs().max() <= 2**-10 * ours.abs().max()
    section = json.loads((made.output / "config.json").read_text())["quantization"]
    assert (section["bits"], section["group_size"]) == (bits, 64)
    assert section.get("model.embed_tokens", section)["bits"] == max(6, bits)
    mx = pytest.importorskip("mlx.core", reason='pip install "mlx[cpu]"')
    for name, wanted in names.items():
        parts = [mx.array(stored[f"{name}.{part}"].numpy()) for part in ("weight", "scales", "biases")]
        theirs = torch.tensor(mx.dequantize(*parts, group_size=64, bits=wanted).astype(mx.float32).tolist())
        # MLX computes in the scales' own float16.
        ours = plain[f"{name}.weight"]
        assert (theirs - ours).abs().max() <= 2**-9 * ours.abs().max()


@pytest.mark.parametrize(
    ("to", "name", "settings", "complaint"),
    [
        ("compressed-tensors", "ct-w4g128", ("rotate=online",), "proj: its input turns at run time"),
        ("compressed-tensors", "gguf-q4_0", (), "embedding and head stay unquantized there, got grid 'int8'"),
        ("compressed-tensors", "ct-w4g128", ("weights.grid=gauss4",), "int2 to int8, got 'gauss4'; .*ct-w4g128"),
        ("compressed-tensors", "ct-w4g128", ("inputs={grid: int8}",), "cannot round what this model rounds"),
        ("compressed-tensors", "ct-w4g128", ("weights.grid=uint4",), "holds grids int2 to int8, got 'uint4'"),
        ("mlx", "mlx-4", ("weights.group_size=16",), "groups of 32, 64, 128 columns, got group_size=16"),
        ("mlx", "mlx-4", ("weights.grid=uint7",), "evenly spaced grids of 2, 3, 4, 5, 6, 8 bits, got 'uint7'"),
        ("mlx", "mlx-4", ("outliers=2",), "2 of its columns have a grid of their own, which MLX cannot say"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(to, name, settings, complaint, tmp_path, tiny_tokenizer):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, **SIZES)
    recipe = apply_settings(preset(name), ["test=null", *settings, *SHORT])
    out = paley.quantize(model, recipe, output=tmp_path / "out").output
    with pytest.raises(PaleyError, match=complaint):
        export_to(out, to, output=tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


SHORT = ["weights.method=nearest", "calibration.sequences=1", "calibration.seq_len=32"]


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(PaleyError, match=r"to: must be gguf, compressed-tensors, mlx, plain, got 'mxl'; did you mean"):
        export_to(tmp_path, "mxl", output=tmp_path / "made")
    assert list(FORMATS) == ["gguf", "compressed-tensors", "mlx", "plain"]
