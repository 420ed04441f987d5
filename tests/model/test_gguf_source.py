"""GGUF files as models: the same logits as the folder that a file was made of, and facts that transformers loses."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import paley
from command_line import paley_
from gguf_models import FAMILIES, LLAMA3, byte_tokenizer, file_of, quantized, save, sentencepiece
from llama_cpp import open_llama_cpp
from paley.core.errors import PaleyError
from paley.export.gguf import export_gguf
from paley.format.gguf import GgufFile
from paley.model.folders import resolve
from paley.model.loading import open_source, read_config
from paley.recipe import apply_settings, preset

gguf = pytest.importorskip("gguf")

IDS = torch.arange(10, 50)[None]
GRANITE = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """(a quantized folder, its GGUF file)."""
    return written(tmp_path_factory.mktemp("llama"), tokenizer, "llama")


def written(folder: Path, tokenizer, family: str, **changes: object) -> tuple[Path, Path]:
    out = quantized(save(folder / "model", tokenizer, family, **changes), folder / "out")
    return out, file_of(export_gguf(out, output=folder / "gguf").output)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", [*FAMILIES, "llama3 rope"])
def test_a_file_is_the_model_that_it_was_made_of(family, tokenizer, tmp_path):
    changes = {"rope_parameters": LLAMA3} if family == "llama3 rope" else {}
    out, file = written(tmp_path, tokenizer, "llama" if changes else family, **changes)
    source = open_source(file)
    assert source.extra == {}
    want = logits(paley.load(out, product="dense"))
    assert (logits(source.load()) - want).norm() <= 1e-5 * want.norm()
    ours, theirs = read_config(out), read_config(resolve(file))
    assert ours.rope_parameters == theirs.rope_parameters  # with Llama 3's factors, and both bases of Gemma 3
    for name in ("head_dim", "query_pre_attn_scalar", "layer_types", "no_rope_layers", "sliding_window", *GRANITE):
        assert getattr(ours, name, None) == pytest.approx(getattr(theirs, name, None)), name


def test_the_tokenizer_is_that_of_the_model(llama, tokenizer):
    theirs = AutoTokenizer.from_pretrained(resolve(llama[1]))
    for text in ("Once upon a time, there were 12 girls' toys.", "<b>the</b> other\n\n  one", "héllo"):
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert theirs.chat_template == tokenizer.chat_template
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)


def test_pieces_with_scores_are_a_tokenizer_with_merges(tmp_path):
    tokenizer = sentencepiece()
    file = written(tmp_path, tokenizer, "llama", vocab_size=400)[1]
    theirs = AutoTokenizer.from_pretrained(resolve(file))
    for text in ("the other one on a theatre", " two  spaces", "</s> then <s>the", "héllo 你\n\n", ""):
        ids = tokenizer(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids
        assert "<s>" in text or theirs.decode(ids, skip_special_tokens=True).strip() == text.strip()


def test_a_way_to_split_text_that_is_not_known_is_refused(llama, tmp_path):
    changed = rewritten(llama[1], tmp_path / "changed.gguf", tokenizer__ggml__pre="gpt-4o")
    with pytest.raises(PaleyError, match=r"splits text by 'gpt-4o', which Paley does not know; known are gpt-2"):
        resolve(changed)
    qwen = rewritten(llama[1], tmp_path / "qwen.gguf", tokenizer__ggml__pre="qwen2")
    assert AutoTokenizer.from_pretrained(resolve(qwen)).bos_token is None  # it names one that no text begins with


def test_quantize_eval_and_generate_take_a_file(llama, tmp_path):
    out, file = llama
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} stories of {n * n} words, told {n % 7} times." for n in range(400)))
    sizes = ["test.sequences=2", "test.seq_len=32", "weights.method=nearest"]
    again = ["--preset", "gguf-q8_0", "--test", text, "--output", tmp_path / "again"]
    paley_("quantize", file, *again, "--set", *sizes)
    first, second = (json.loads((f / "plan.json").read_text()) for f in (out, tmp_path / "again"))
    assert first["linears"] == second["linears"]
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert not list((tmp_path / "again").glob("*.gguf"))
    scored = ["--data", text, "--sequences", 2, "--seq-len", 32, "--json"]
    found = json.loads(paley_("eval", tmp_path / "again", "--against", file, *scored).out)
    assert 0 <= found["kl"] < 0.1
    assert json.loads(paley_("eval", file, *scored).out)["nll"] == pytest.approx(found["reference_nll"], rel=1e-6)
    made = json.loads(paley_("generate", file, "Once", "--max-new-tokens", 4, "--json").out)
    assert made["text"] == json.loads(paley_("generate", out, "Once", "--max-new-tokens", 4, "--json").out)["text"]


def test_streaming_processes_read_a_file(llama, tmp_path):
    recipe = apply_settings(preset("higgs-3"), ["test=null", "hadamard=16"])
    made = paley.quantize(llama[1], recipe, output=tmp_path / "out", workers=2).output
    alone = paley.quantize(llama[1], recipe, output=tmp_path / "alone").output
    assert (made / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_each_type_is_decoded_as_the_gguf_package_does(kind, tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).numpy()
    number = getattr(gguf.GGMLQuantizationType, kind)
    data = gguf.quantize(values, number)
    writer.add_tensor("token_embd.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile.open(file).tensors["token_embd.weight"]
    assert found.shape == (6, 64)
    assert torch.equal(found.read().float(), torch.from_numpy(gguf.dequantize(data, number).copy()))


def rewritten(file: Path, new: Path, **changes: object) -> Path:
    """The file with other values of some keys, "." for "__" in their names; None takes one out."""
    reader = gguf.GGUFReader(file)
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(new, changed.pop("general.architecture", "llama"))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and changed.get(key, 0) is not None:
            writer.add_key_value(key, changed.get(key, field.contents()), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


def test_a_damaged_file_is_refused_in_one_line(llama, tmp_path):
    file, data = tmp_path / "model.gguf", bytearray(llama[1].read_bytes())
    for size in (0, 3, 100, len(data) // 2, len(data) - 5):
        file.write_bytes(data[:size])
        with pytest.raises(PaleyError, match=r"model\.gguf: (is no whole GGUF file|truncated: '.*' ends at byte)"):
            resolve(file)
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    data[at] = 133
    file.write_bytes(data)
    with pytest.raises(PaleyError, match=r"of types that the gguf package knows: .*133"):
        resolve(file)
    data[at : at + 1] = bytes([gguf.GGMLQuantizationType.Q4_K])  # its blocks are of 256 values, the row is of 128
    file.write_bytes(data)
    with pytest.raises(PaleyError, match="is no whole GGUF file"):
        resolve(file)


def test_changed_bytes_are_refused_or_read(llama, tmp_path):
    """Whatever stands in keys and names: a PaleyError, or a model; never another error, nor for ever."""
    data, file, refused = llama[1].read_bytes(), tmp_path / "model.gguf", 0
    end, draw = data.index(b"blk.2.ffn_up.weight") + 60, random.Random(0)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 2, 4])):
            changed[draw.randrange(end)] = draw.choice([0, 255, draw.randrange(256)])
        file.write_bytes(changed)
        try:
            open_source(file)
        except PaleyError:
            refused += 1
    assert 10 < refused < 60


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general__architecture": "rwkv6"}, "is of architecture 'rwkv6'; those that Paley reads are llama, smollm3"),
        ({"llama__block_count": None}, "has no key llama.block_count"),
        ({"llama__rope__dimension_count": 16}, "RoPE turns 16 of 32 values"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(changes, complaint, llama, tmp_path):
    with pytest.raises(PaleyError, match=complaint):
        resolve(rewritten(llama[1], tmp_path / "changed.gguf", **changes))


def test_without_the_package_the_way_to_get_it_is_said(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    file = shutil.copy(llama[1], tmp_path / "other.gguf")
    with pytest.raises(PaleyError, match=r'package gguf is missing .*; pip install "paley\[gguf\]"'):
        resolve(file)


FILES = [path for path in os.environ.get("PALEY_GGUF", "").split(os.pathsep) if path]


def in_float32(file: Path, new: Path) -> Path:
    """The same values, but the rows that this llama.cpp multiplies wrongly (findings) in float32."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if tensor.tensor_type.name in ("Q4_1", "Q5_1") and tensor.shape[0] % 128:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


@pytest.mark.slow
@pytest.mark.skipif(not FILES, reason="set PALEY_GGUF to published GGUF files, with colons between them")
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).name)
def test_a_published_file_says_what_llama_cpp_says(file, tmp_path):
    """Within what llama.cpp loses by rounding inputs to 8 bits."""
    rows = [info for info in GgufFile.open(Path(file)).tensors.values() if info.kind in ("Q4_1", "Q5_1")]
    wrong = any(info.shape[-1] % 128 for info in rows)
    read = in_float32(Path(file), tmp_path / "float32.gguf") if wrong else Path(file)
    source = open_source(file)
    ids = source.tokenizer()(PASSAGE)["input_ids"]
    with open_llama_cpp(read) as peer:
        assert peer.tokens(PASSAGE) == ids
        theirs = peer.logits(ids).log_softmax(-1)
    with torch.no_grad():
        ours = source.load()(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    error = float(kl.std() / len(kl) ** 0.5)
    print(f"{Path(file).name}: KL {float(kl.mean()):.4f} ± {error:.4f}, top-1 {top1:.3f}, {len(ids)} tokens")
    assert float(kl.mean()) < 0.03
    assert top1 > 0.85


PASSAGE = (
    "The river rises in the hills north of the town and flows for some 40 miles to the sea. In 1842, a bridge of stone "
    "was built where the old ford had been; it has carried the road ever since. Fishermen say that the pools below it "
    "hold trout of up to six pounds, though nobody has caught one for years. In spring, when the snow melts, the water "
    "covers the meadows on both banks, and the farmers drive their sheep to higher ground."
)
