"""Checkpoints as people have them, with more tensors, other names, formats and files: read by their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import paley
from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source
from paley.pipeline import Monitor, quantize
from paley.recipe import apply_settings
from tiny_models import change_config, change_tensors, higgs, save_tiny

IDS = torch.tensor([[7, 19, 250, 33, 8, 4, 90, 91, 92, 17]])
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    return save_tiny(tmp_path / "model", tiny_tokenizer, gains=True)


class Notes(Monitor):
    def __init__(self):
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def weights(folder: Path) -> dict[str, bytes]:
    """Tensors and what is said of them: what a quantized model is."""
    return {name: bytes(t.reshape(-1).view(torch.uint8).tolist()) for name, t in Checkpoint.open(folder).items()}


def make(folder: Path, *settings: str, recipe=None):
    notes = Notes()
    out = folder.parent / f"out-{len(list(folder.parent.iterdir()))}"
    quantize(folder, recipe or higgs(*settings), output=out, monitor=notes)
    return out, notes.notes


# --- tensors that no module reads ---------------------------------------------------------------------------

EXTRA = {
    "mtp.fc.weight": torch.ones(4, 8), "mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bfloat16),
    "model.layers.2.self_attn.q_proj.weight": torch.ones(48, 48), "model.layers.61.eh_proj.weight": torch.ones(2, 2),
    "visual.patch_embed.proj.weight": torch.ones(2, 3, 4, 4), "score.weight": torch.ones(2, 48),
    "model.value_head.bias": torch.ones(1), "steps": torch.ones(1, dtype=torch.int64),
}  # fmt: skip


def test_layers_beyond_the_config_are_named(folder):
    change_config(folder, num_hidden_layers=1)
    out, notes = make(folder)
    assert any("model.layers.* (9 tensors)" in note for note in notes)
    assert not any("layers.1." in name for name in Checkpoint.open(out).names)
    paley.load(out)


@torch.no_grad()
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", [None, *EXTRA])
def test_tensors_that_no_module_reads_are_named_and_dropped_or_carried(folder, name, carry):
    extra = EXTRA if name is None else {name: EXTRA[name]}
    plain, _ = make(folder)
    change_tensors(folder, lambda tensors: tensors | extra)
    out, notes = make(folder, *(["extra_tensors=carry"] if carry else []))
    (said,) = [note for note in notes if "no module of the model reads" in note]
    assert ("stored unchanged" in said) == carry
    assert name is None or name in said
    stored = Checkpoint.open(out)
    assert {n for n in stored.names if n in extra} == (set(extra) if carry else set())
    if carry:
        assert all(torch.equal(stored[n], tensor) and stored[n].dtype == tensor.dtype for n, tensor in extra.items())
        assert len(paley.inspect(out).to_dict()["untouched_bytes"]) >= 1
    assert weights(out).items() >= weights(plain).items()
    assert torch.equal(paley.load(out)(IDS).logits, paley.load(plain)(IDS).logits)
    assert paley.verify(out).not_covered == ()


def test_carried_tensors_of_other_formats_stay_in_them(folder):
    """As they are stored: a layer beyond the config in FP8 has its scales beside it."""
    stored, _ = in_fp8(Checkpoint.open(folder))
    extra, _ = in_fp8({"model.layers.2.self_attn.q_proj.weight": torch.randn(48, 48)})
    extra |= {"mtp.up_blocks": torch.ones(2, 3, 1, 16).byte(), "mtp.up_scales": torch.ones(2, 3, 1).byte()}
    change_tensors(folder, lambda _: stored | extra)
    change_config(folder, quantization_config=FP8_CONFIG)
    out, _ = make(folder, "extra_tensors=carry")
    kept = Checkpoint.open(out)
    for name, tensor in extra.items():
        assert kept.dtype(name) == tensor.dtype
        assert torch.equal(kept[name].view(torch.uint8), tensor.view(torch.uint8))
    paley.load(out)


@torch.no_grad()
@pytest.mark.parametrize("made", ["plain", "compressed-tensors", "mlx"])
def test_carried_tensors_are_in_other_formats_too(tmp_path, tiny_tokenizer, made):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, hidden_size=128, intermediate_size=256)
    change_tensors(folder, lambda tensors: tensors | EXTRA)
    recipe = apply_settings(
        paley.preset("mlx-4" if made == "mlx" else "ct-w4g128"),
        ["test=null", "weights.method=nearest", "extra_tensors=carry", "dtype=float32"],
    )
    out, _ = make(folder, recipe=recipe)
    to = tmp_path / "to"
    exported = paley.dequantize(out, output=to, dtype="float16") if made == "plain" else None
    exported = exported or paley.export_to(out, made, output=to)
    stored = Checkpoint.open(exported.output)
    assert all(torch.equal(stored[n], tensor) and stored.dtype(n) == tensor.dtype for n, tensor in EXTRA.items())


def test_a_calibrated_run_carries_them_too(folder, tmp_path):
    (tmp_path / "text.txt").write_text("three bits are enough for anybody\n\n" * 400)
    change_tensors(folder, lambda tensors: tensors | EXTRA)
    text = f"calibration={{source: {tmp_path / 'text.txt'}, sequences: 4, seq_len: 16}}"
    settings = ["test=null", "search.method=none", "hadamard=16", "fit_groups=true", "extra_tensors=carry", text]
    recipe = apply_settings(paley.preset("w4a16"), settings)
    out, _ = make(folder, recipe=recipe)
    stored = Checkpoint.open(out)
    assert all(torch.equal(stored[name], tensor) for name, tensor in EXTRA.items())
    paley.load(out)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.norm.bias",
             "lm_head.bias", "model.layers.0.mlp.router.weight", "model.embed_tokens.scale"],
)  # fmt: skip
def test_a_tensor_inside_a_module_is_none_of_those(folder, name):
    """It would change what the model computes: config and weights disagree."""
    change_tensors(folder, lambda tensors: tensors | {name: torch.ones(48)})
    with pytest.raises(PaleyError, match=f"disagree: 1 tensors too many, the first is {name}"):
        open_source(folder)


def test_the_head_of_another_part_is_no_head_of_the_model(tmp_path, tiny_tokenizer):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=True)
    plain, _ = make(folder)
    change_tensors(folder, lambda tensors: tensors | {"mtp.lm_head.weight": torch.ones(260, 48)})
    out, notes = make(folder)
    assert weights(out) == weights(plain)
    assert any("mtp.lm_head.weight" in note for note in notes)


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qwen", [False, True])
@pytest.mark.parametrize("prefix", ["", "language_model.model.", "transformer.", "base_model.model.model."])
def test_other_prefixes(tmp_path, tiny_tokenizer, prefix, qwen):
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=qwen)
    plain, _ = make(folder)
    change_tensors(
        folder, lambda ts: {n.replace("model.", prefix) if n.startswith("model.") else n: t for n, t in ts.items()}
    )
    out, _ = make(folder)
    assert weights(out) == weights(plain)


def test_a_bare_model_without_its_own_head_is_told_so(folder):
    change_tensors(folder, lambda ts: {n.removeprefix("model."): t for n, t in ts.items() if n != "lm_head.weight"})
    with pytest.raises(PaleyError, match=r"no tensor 'lm_head.weight'"):
        open_source(folder)


# --- formats ------------------------------------------------------------------------------------------------


def in_fp8(tensors, end="_scale_inv"):
    """-> (stored in FP8 with blocks of 16 x 16, the same decoded)."""
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.startswith("model.layers"):
            stored[name] = plain[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.1
        wide = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        stored[name], stored[name + end] = (tensor / wide).to(torch.float8_e4m3fn), scales
        plain[name] = stored[name].float() * wide
    return stored, plain


@pytest.mark.parametrize("where", ["config", "nowhere"])
def test_fp8_is_quantized_as_its_decoded_weights_are(folder, where):
    stored, plain = in_fp8(Checkpoint.open(folder))
    change_tensors(folder, lambda _: plain)
    expected, _ = make(folder)
    change_tensors(folder, lambda _: stored)
    if where == "config":
        change_config(folder, quantization_config=FP8_CONFIG)
    else:  # blocks are then taken as 128 x 128, as long as no entry of the config says otherwise
        with pytest.raises(PaleyError, match="fits no blocks"):
            open_source(folder)
        return
    out, notes = make(folder)
    assert weights(out) == weights(expected)
    assert "14 weights are stored in FP8 and were decoded" in notes
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "paley"
    loaded = open_source(folder).load()
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, plain["model.layers.1.mlp.up_proj.weight"])
    assert getattr(loaded.config, "quantization_config", None) is None


def test_fp8_without_its_scales_is_refused(folder):
    stored, _ = in_fp8(Checkpoint.open(folder))
    change_tensors(folder, lambda _: {n: t for n, t in stored.items() if "scale" not in n})
    change_config(folder, quantization_config=FP8_CONFIG)
    with pytest.raises(
        PaleyError, match=r"quantized already \(fp8\), and .* has no scale that it could be decoded with"
    ):
        open_source(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_that_nothing_calls_quantized_has_the_values_it_has(folder, dtype):
    """Weights that were cast, as one casts to bfloat16."""
    change_tensors(folder, lambda tensors: {n: t.to(dtype).float() for n, t in tensors.items()})
    expected, _ = make(folder)
    change_tensors(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    out, notes = make(folder)
    assert weights(out) == weights(expected)
    assert "21 weights are stored in FP8 without scales and were decoded" in notes


LEFT_OVER = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors", "config_groups": {}}, {"bits": 4},
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "entry"),
    [*(("quantization_config", entry) for entry in LEFT_OVER), ("compression_config", LEFT_OVER[4]),
     ("quantization", {"group_size": 64, "bits": 4})],
)  # fmt: skip
def test_an_entry_left_over_beside_plain_weights_is_dropped(folder, key, entry):
    plain, _ = make(folder)
    change_config(folder, **{key: entry})
    out, notes = make(folder)
    assert weights(out) == weights(plain)
    assert any(f"{key} of config.json is left over" in note for note in notes)
    config = json.loads((out / "config.json").read_text())
    assert config.get(key, {}).get("quant_method", "paley") == "paley"
    assert {"compression_config", "quantization"}.isdisjoint(config)


UP = "model.layers.0.mlp.up_proj"
PACKED = {
    "gptq": lambda t: (
        {n: x for n, x in t.items() if n != f"{UP}.weight"}
        | {f"{UP}.qweight": torch.ones(6, 37).int(), f"{UP}.scales": torch.ones(1, 37)}
    ),
    "bitsandbytes": lambda t: t | {f"{UP}.weight": torch.ones(888, 1).byte(), f"{UP}.weight.absmax": torch.ones(4)},
    "compressed-tensors": lambda t: (
        {n: x for n, x in t.items() if n != f"{UP}.weight"}
        | {f"{UP}.weight_packed": torch.ones(37, 6).int(), f"{UP}.weight_scale": torch.ones(37, 1)}
    ),
    "paley": lambda t: t,
}


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_are_refused(folder, method):
    change_tensors(folder, PACKED[method])
    change_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(PaleyError, match=rf"is quantized already \({method}\); give the original"):
        open_source(folder)


# --- files beside the weights ----------------------------------------------------------------------------------


def test_every_other_file_is_carried_along(folder):
    carried = [
        "tekken.json", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "vocab.bpe", "LICENSE",
        "tokenizer.tiktoken", "a/b/c.txt", "modeling_x.py", "special words.txt",
    ]  # fmt: skip
    left = ["pytorch_model.bin", "consolidated.00.pth", "onnx/model.onnx", "model-q4.gguf", "a/x.safetensors",
            ".git/config", ".cache/x", "pytorch_model.bin.index.json", "model.safetensors.index.fp32.json",
            "MODEL.GGUF", "onnx/model.onnx.data", "hf_quant_config.json", "quantize_config.json"]  # fmt: skip
    for name in (*carried, *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "elsewhere").symlink_to("/etc")
    (folder / "linked.json").symlink_to(folder / "tekken.json")  # as all files of the Hub's cache are
    out, _ = make(folder)
    assert (out / "linked.json").read_text() == "tekken.json"
    assert not (out / "linked.json").is_symlink()
    assert all((out / name).read_text() == name for name in carried)
    assert not any((out / name).exists() for name in (*left, "elsewhere"))
    plain = out.with_name("plain")
    paley.dequantize(out, output=plain)
    assert all((plain / name).read_text() == name for name in carried)
    for made in (out, plain):
        assert paley.verify(made).not_covered == ()
        (made / "a/b/c.txt").write_text("?")
        with pytest.raises(PaleyError, match=r"a/b/c\.txt: has 1 bytes, was written with 9"):
            paley.verify(made)
