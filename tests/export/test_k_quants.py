"""K-quants: the gguf package decodes what was fitted, and the error is that of a good quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import paley
from gguf_models import byte_tokenizer, expert_of, file_of, quantized, save
from llama_cpp import open_llama_cpp
from paley.core.errors import PaleyError
from paley.export.k_quants import fit_q4_k, fit_q6_k
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source
from paley.recipe import apply_settings, preset

gguf = pytest.importorskip("gguf")

IDS = torch.arange(10, 50)[None]
FITS = {"Q4_K": fit_q4_k, "Q6_K": fit_q6_k}


def decoded(data: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def error(weight: torch.Tensor, kind: str) -> float:
    return float((decoded(FITS[kind](weight), kind) - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.00522), ("Q6_K", 0.000307)])
def test_gaussian_weights(kind, most):
    """No worse than ggml's own search, by its function ggml_quantize_chunk."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert error(weight, kind) < most
    assert error(weight * 1e-2, kind) < 1.1 * most


@pytest.mark.parametrize("kind", FITS)
def test_what_the_type_holds_is_kept(kind):
    """Random blocks are decoded, fitted and decoded again."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (8, size), dtype=np.uint8)
    halves = slice(0, 4) if kind == "Q4_K" else slice(size - 2, size)
    blocks[:, halves] = np.tile(np.frombuffer(np.float16(0.01).tobytes(), np.uint8), (halves.stop - halves.start) // 2)
    weight = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).copy())
    assert error(weight, kind) < 1e-3


@pytest.mark.parametrize("kind", FITS)
def test_rows_of_zeros_of_one_value_and_of_one_outlier(kind):
    weight = torch.zeros(4, 256)
    weight[1], weight[2, 7], weight[3] = 0.25, -1000.0, -0.25
    found = decoded(FITS[kind](weight), kind)
    assert torch.equal(found[0], weight[0])
    assert torch.allclose(found[[1, 3]], weight[[1, 3]], rtol=2e-3)
    assert found[2, 7] == pytest.approx(-1000, rel=2e-2)
    assert bool((found[2].abs() <= 1000 * 1.02).all())


@pytest.mark.parametrize("kind", FITS)
def test_rows_whose_scales_float16_barely_holds(kind):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) * 3e-6
    assert error(weight, kind) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q8_0"])
def test_any_folder_becomes_a_file_of_a_type_and_the_loss_is_told(kind, tmp_path):
    """A rotated folder on grids of vectors, with rows of 128 and 320 values, which no superblock divides."""
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}
    model = save(tmp_path / "model", byte_tokenizer(), "llama", **sizes)
    out = paley.quantize(model, apply_settings(preset("higgs-4"), ["test=null"]), output=tmp_path / "out").output
    made = paley.export_to(out, "gguf", output=tmp_path / "gguf", kind=kind)
    told = gguf.GGUFReader(file_of(made.output)).fields["general.file_type"].contents()
    assert told == {"q4_k": 14, "q6_k": 18, "q8_0": 7}[kind]  # MOSTLY_Q4_K_S, MOSTLY_Q6_K, MOSTLY_Q8_0
    narrow = {"q4_k": "Q5_0", "q6_k": "Q8_0", "q8_0": "Q8_0"}[kind]
    assert made.types[kind.upper()] == {"q4_k": 10, "q6_k": 12, "q8_0": 16}[kind]
    assert made.types[narrow] >= 4
    (note,) = made.notes
    assert note.startswith("16 weights are rounded anew: |W - W'|^2 / |W|^2 is ")
    most = {"q4_k": 0.008, "q6_k": 0.0006, "q8_0": 0.0001}[kind]
    assert float(note.split(" is ")[1].split()[0]) < most
    assert note.split(" is ")[1] in (made.output / "README.md").read_text()
    models = paley.load(out, product="dense"), open_source(file_of(made.output)).load()
    ours, theirs = (model(IDS, use_cache=False).logits for model in models)
    assert (ours - theirs).norm() < 8 * most**0.5 * ours.norm()
    with open_llama_cpp(file_of(made.output)) as peer:
        assert (peer.logits(IDS[0].tolist()) - theirs[0]).norm() < 0.15 * ours.norm()
    assert not list(tmp_path.glob(".gguf*/plain"))


@pytest.mark.parametrize(("kind", "down"), [("q4_k", "Q5_0"), ("q6_k", "Q8_0"), ("q8_0", "Q8_0")])
def test_stacks_of_experts_are_rounded_anew(kind, down, tmp_path):
    """Gate and up of each expert come apart; rows of down have 64 values, which no superblock divides."""
    model = save(tmp_path / "model", byte_tokenizer(), "qwen3_moe", hidden_size=256, num_hidden_layers=2)
    out = paley.quantize(model, apply_settings(preset("higgs-4"), ["test=null"]), output=tmp_path / "out").output
    made = paley.export_to(out, "gguf", output=tmp_path / "gguf", kind=kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file_of(made.output)).tensors}
    plain = Checkpoint.open(paley.dequantize(out, output=tmp_path / "plain", dtype="float32").output)
    most = {"q4_k": 0.008, "q6_k": 0.0006, "q8_0": 0.0001}[kind]
    for part, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        theirs = found[f"blk.1.ffn_{part}_exps.weight"]
        assert theirs.tensor_type.name == (down if part == "down" else kind.upper())
        assert theirs.shape.tolist() == ([64, 256, 4] if part == "down" else [256, 64, 4])
        stack = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy())
        for expert in range(4):
            ours = expert_of(plain, expert, name)
            assert (stack[expert] - ours).square().sum() < most * ours.square().sum(), (part, expert)
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    (note,) = made.notes
    assert note.startswith("16 weights are rounded anew")  # of two layers: four linears and three stacks; and two more


def test_stacks_without_codes_ask_for_a_type(tmp_path):
    model = save(tmp_path / "model", byte_tokenizer(), "qwen3_moe")
    out = quantized(model, tmp_path / "out", 'overrides=[{pattern: "*.experts.*", keep: true}]')
    with pytest.raises(PaleyError, match=r"this one has none; quantize it by a preset .*, or set kind=Q4_K"):
        paley.export_to(out, "gguf", output=tmp_path / "gguf")
    assert paley.export_to(out, "gguf", output=tmp_path / "gguf", kind="Q8_0").types["Q8_0"] > 0


def test_a_type_that_is_none_or_of_another_format(tmp_path):
    with pytest.raises(PaleyError, match=r"kind: must be Q4_K, Q6_K, Q8_0, .* got 'Q4_M'; did you mean"):
        export_gguf_of(tmp_path, "Q4_M")
    with pytest.raises(PaleyError, match="kind is a type of gguf's; leave it out, got 'Q4_K'"):
        paley.export_to(tmp_path, "mlx", output=tmp_path / "mlx", kind="Q4_K")


def test_a_tokenizer_that_gguf_cannot_say_is_refused_before_any_work(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("decoded before it was refused")

    monkeypatch.setattr("paley.export.gguf.decoded", never)
    out = quantized(save(tmp_path / "model", byte_tokenizer(), "llama"), tmp_path / "out")
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text().replace('"BPE"', '"WordLevel"'))
    with pytest.raises(PaleyError, match="no tokenizer can be loaded here"):
        paley.export_to(out, "gguf", output=tmp_path / "gguf", kind="Q8_0")


@pytest.mark.parametrize(
    ("family", "sizes", "complaint"),
    [
        ("llama", {"intermediate_size": 72}, r"down_proj: no type of GGUF that Q4_K stands for has rows of 72 values"),
    ],
)
def test_weights_that_no_type_holds_are_refused_before_any_work(family, sizes, complaint, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("decoded before it was refused")

    monkeypatch.setattr("paley.export.gguf.decoded", never)
    model = save(tmp_path / "model", byte_tokenizer(), family, **sizes)
    keep = ('overrides=[{pattern: "*.down_proj", keep: true}]',) if sizes else ()
    with pytest.raises(PaleyError, match=complaint):
        paley.export_to(quantized(model, tmp_path / "out", *keep), "gguf", output=tmp_path / "gguf", kind="Q4_K")
    assert not (tmp_path / "gguf").exists()


def export_gguf_of(folder, kind):
    model = save(folder / "model", byte_tokenizer(), "llama")
    return paley.export_to(quantized(model, folder / "out"), "gguf", output=folder / "gguf", kind=kind)
