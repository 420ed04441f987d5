"""The engine's refusals: damaged files before a kernel sees them, texts that cannot be read, and Ctrl-C."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import quantized
from safetensors.torch import load_file

import paley
from paley.core.errors import PaleyError
from paley.kernels import native
from paley.pipeline.opening import TextModel
from paley.runtime import Engine
from tiny_models import change_tensors, unseal

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    return quantized(tmp_path_factory.mktemp("refusals"), tiny_tokenizer, "higgs-4")


@pytest.fixture
def damaged(folder, tmp_path, monkeypatch) -> Path:
    """A folder to damage; every call of native code fails the test."""

    def called(function: Any, *arguments: Any) -> None:
        raise AssertionError(f"{function.__name__} was called")

    monkeypatch.setattr(native, "call", called)
    return shutil.copytree(folder, tmp_path / "copy")


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_kernels_are_called_for_a_sound_folder(damaged):
    """Else the tests below would prove nothing."""
    with pytest.raises(AssertionError, match="was called"):
        Engine.open(damaged)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.99])
def test_a_bit_that_flipped_is_refused_first(damaged, place):
    data = bytearray(weights(damaged).read_bytes())
    data[int(place * len(data))] ^= 1
    weights(damaged).write_bytes(data)
    with pytest.raises(PaleyError, match="not as written: the file is damaged"):
        Engine.open(damaged)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_file_is_refused_first(damaged, kept):
    data = weights(damaged).read_bytes()
    weights(damaged).write_bytes(data[:kept])
    with pytest.raises(PaleyError, match=r"truncated|no safetensors file"):
        Engine.open(damaged)


def changed(name: str, change: Any) -> Any:
    return lambda tensors: tensors | {name: change(tensors[name].clone())}


def filled(value: float) -> Any:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(f"{Q}.scales", filled(float("nan"))), rf"{Q}\.scales"),
        (changed(f"{Q}.scales", filled(-1.0)), rf"{Q}\.scales"),
        (changed(f"{DOWN}.codes", lambda codes: codes[:, :-1]), rf"{DOWN}\.codes is .*, must be"),
        (changed(f"{DOWN}.codes", lambda codes: codes.int()), rf"{DOWN}\.codes is torch\.int32"),
        (changed(f"{EMBEDDING}.scales", lambda scales: scales[:-1]), rf"{EMBEDDING}\.scales is .*, must be"),
        (changed("model.norm.weight", filled(float("inf"))), r"model\.norm\.weight holds a number that is not finite"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != f"{Q}.codes"}, rf"'{Q}\.codes' is missing"),
        (lambda tensors: tensors | {"model.extra": torch.zeros(1)}, "'model.extra' is in the files, but not in"),
    ],
)
def test_tensors_of_an_unsealed_folder_are_checked_first(damaged, change, message):
    change_tensors(unseal(damaged), change)
    with pytest.raises(PaleyError, match=message):
        Engine.open(damaged)


def test_codes_that_the_grid_does_not_have_reach_no_matrix(tmp_path, tiny_tokenizer):
    """Two codes below 88 are a number below 7,744 in 13 bits; larger ones are no codes."""
    out = quantized(tmp_path, tiny_tokenizer, "higgs-4", "weights.grid=p2n88")
    name = f"{Q}.codes"
    assert name in load_file(weights(out))
    change_tensors(unseal(out), changed(name, lambda codes: codes.fill_(255).index_fill(1, torch.tensor([-1]), 0)))
    with pytest.raises(PaleyError, match="not 2 codes below 88; the file is damaged"):
        Engine.open(out)


# --- texts


def test_a_text_beyond_the_context_is_refused_before_it_is_read(folder):
    with pytest.raises(PaleyError, match=r"more than the 512 tokens .*; use max_new_tokens=502"):
        paley.generate(folder, "0123456789", max_new_tokens=503)
    with pytest.raises(PaleyError, match="use a shorter prompt"):
        paley.generate(folder, "0" * 512, max_new_tokens=1)
    assert paley.generate(folder, "0" * 510, max_new_tokens=2).engine == "native"


def test_an_empty_prompt_begins_with_bos_or_is_refused(folder, tiny_tokenizer):
    found = paley.generate(folder, "", max_new_tokens=2)
    assert (found.prompt_tokens, found.engine) == (1, "native")
    without = copy.deepcopy(tiny_tokenizer)
    without.bos_token = None
    with pytest.raises(PaleyError, match="the prompt is empty, and this model has no BOS token"):
        paley.generate(TextModel(Engine.open(folder), without, frozenset()), "")


def test_a_token_of_another_tokenizer_is_refused(folder, tiny_tokenizer):
    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_tokens(["strange"])
    with pytest.raises(
        PaleyError, match="made token 260, but the model's vocabulary has 260 tokens; use the tokenizer"
    ):
        paley.generate(TextModel(Engine.open(folder), larger, frozenset()), "strange", max_new_tokens=1)


# --- Ctrl-C


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Native reads so far."""
    found, call = [], native.call

    def count(function: Any, *arguments: Any) -> None:
        call(function, *arguments)
        if function.__name__ == "paley_read":
            found.append("read")

    monkeypatch.setattr(native, "call", count)
    return found


def test_ctrl_c_between_two_tokens_stops_before_the_next(folder, reads):
    pieces = []

    def write(piece: str) -> None:
        pieces.append(len(reads))
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        paley.generate(folder, "A", max_new_tokens=400, write=write)
    assert len(reads) == pieces[-1]


def test_ctrl_c_while_a_token_is_computed_stops_after_it(folder, reads, monkeypatch):
    """The signal comes while native code runs; Python sees it when the call returns."""
    engine, call = Engine.open(folder), native.call
    context = engine.start()
    engine.read([(context, [5, 6, 7])])

    def interrupted(function: Any, *arguments: Any) -> None:
        if function.__name__ == "paley_read" and len(reads) == 3:
            signal.raise_signal(signal.SIGINT)
        call(function, *arguments)

    monkeypatch.setattr(native, "call", interrupted)

    def go_on() -> None:
        for token in range(20):
            engine.read([(context, [token + 5])])

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert len(reads) in (3, 4)
    assert context.length == 5
    monkeypatch.undo()
    assert torch.equal(engine.read([(context, [7])])[0], engine.read([(engine.start(), [5, 6, 7, 5, 6, 7])])[0])
