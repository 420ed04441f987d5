"""`paley bench` and `paley doctor`: what they measure, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch

import paley
from command_line import paley_
from paley.core.errors import PaleyError
from paley.kernels import gpu, matmul, native
from tiny_models import higgs, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    at = tmp_path_factory.mktemp("bench")
    model = save_tiny(at / "model", tiny_tokenizer, max_position_embeddings=128)
    paley.quantize(model, higgs(name="higgs-4"), output=at / "out")
    return at / "out"


def test_rivals_take_turns(folder, monkeypatch):
    monkeypatch.setattr("paley.pipeline.bench._BYTES", 2**20)
    rounds: list[int] = []
    found = paley.bench(
        folder, against=["bf16", "transformers"], prompt_tokens=9, new_tokens=4, rounds=2, on_round=rounds.append
    )
    assert rounds == [0, 1, 2]
    assert (found.engine, found.reason) == ("native", None)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ratios"].keys() == {"bf16", "transformers"}
    assert data["ratios"]["bf16"]["decode"] == pytest.approx(data["speed"]["decode"] / data["rivals"]["bf16"]["decode"])
    assert found.bytes_per_token is not None
    assert found.bytes_per_token > 2 * 48 * 48
    assert data["bandwidth_of_one"] > 0
    assert found.share == pytest.approx(found.bytes_per_token * found.speed.decode / found.bandwidth)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"against": ["lama.cpp"]}, "did you mean 'llama.cpp'"),
        ({"against": ["llama.cpp"]}, "give gguf=FILE"),
        ({"gguf": "nowhere.gguf"}, "no such file"),
        ({"rounds": 0}, "must be at least 1"),
        ({"prompt_tokens": 100, "new_tokens": 29}, "the model reads 128 tokens, prompt and new ones are 129"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, arguments, complaint):
    with pytest.raises(PaleyError, match=complaint):
        paley.bench(folder, **arguments)


def test_a_missing_rival_comes_with_its_line(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ik_llama_cpp", None)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(PaleyError, match="pip install ik-llama-cpp-python"):
        paley.bench(folder, against=["llama.cpp"], gguf=file, prompt_tokens=2, new_tokens=2)


def test_doctor_finds_a_sound_machine(folder):
    found = paley.doctor(folder)
    assert found.well, found.tests
    assert (found.missing, found.engine) == (None, "native")
    assert sum((found.products or {}).values()) == 15
    assert found.seconds < 30


def test_doctor_finds_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(
        matmul, "matmul", lambda inputs, tokens, matrix, **_: inputs.float().new_ones(tokens, matrix.out)
    )
    found = paley.doctor()
    assert (found.well, found.tests["products in integers"]) == (False, "gives wrong numbers")
    monkeypatch.setattr(native, "why_missing", lambda: "libpaley.so was not built")
    found = paley.doctor()
    assert (found.well, found.tests, found.missing) == (False, {}, "libpaley.so was not built")


def test_doctor_names_the_kernels_for_gpus(monkeypatch):
    if not torch.cuda.is_available():
        assert paley.doctor().gpu.startswith("none: ")
    monkeypatch.setattr(gpu, "why_not", lambda: "PyTorch sees no GPU")
    assert "Triton kernels: none: PyTorch sees no GPU" in paley_("doctor").out
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    assert paley.doctor().gpu.endswith("for a GPU, off: they were not measured yet; PALEY_TRITON=1 takes them")
    monkeypatch.setenv("PALEY_TRITON", "1")
    assert paley.doctor().gpu == "grid_matmul and kv_attention on a GPU (PALEY_TRITON=1)"


def test_the_verbs_print_it(folder):
    assert json.loads(paley_("doctor", folder, "--json").out)["engine"] == "native"
    assert "run by the native engine" in paley_("doctor", folder).out
    made = json.loads(paley_("generate", folder, "ab", "--max-new-tokens", 3, "--json").out)
    assert (made["engine"], made["reason"]) == ("native", None)
    options = ("--prompt-tokens", 3, "--new-tokens", 2, "--rounds", 1)
    assert "decode" in paley_("bench", folder, *options).out
    paley_("bench", folder, "--rounds", 0, code=2)
