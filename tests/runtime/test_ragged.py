"""Texts of 1 to 17 tokens that are read together, in empty and in full contexts: the same bits as read alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import quantized

from paley.kernels import native as kernels
from paley.runtime import Engine, native
from paley.runtime import engine as engine_module

# Heads of 12 values, an MLP of 37, a vocabulary of 260: none is a multiple of a vector, a panel or a block.
RECIPES = {
    "w4a4kv4": "higgs-w4a4kv4",
    "k4v2": "higgs-w4a16k4v2",
    "w3a3kv3": "higgs-w3a3kv3",
    "w4a8kv8": "higgs-w4a8kv8",
}


def text(tokens: int, start: int = 0) -> list[int]:
    return [(7 * i + start) % 250 + 5 for i in range(tokens)]


def alone(engine: Engine, tokens: list[int]) -> torch.Tensor:
    return engine.read([(engine.start(), tokens)])[0]


@pytest.fixture(scope="module", params=RECIPES)
def engine(request: Any, tmp_path_factory: Any, tiny_tokenizer: Any) -> Engine:
    folder = quantized(tmp_path_factory.mktemp("ragged"), tiny_tokenizer, RECIPES[request.param], qwen=True)
    return Engine.open(folder, threads=2)


def test_rows_of_any_number_are_read_together(engine):
    """The first text of each length begins in an empty context, the second one follows 63 tokens: a page ends in it."""
    for tokens in range(1, 18):
        held = engine.start()
        engine.read([(held, text(63))])
        rows = engine.read([(engine.start(), text(tokens)), (held, text(tokens, 3)), (engine.start(), text(1, tokens))])
        assert torch.equal(rows[0], alone(engine, text(tokens))), tokens
        assert torch.equal(rows[1], alone(engine, text(63) + text(tokens, 3))), tokens
        assert torch.equal(rows[2], alone(engine, text(1, tokens))), tokens


def test_seventeen_texts_are_read_together(engine):
    contexts = [engine.start() for _ in range(17)]
    rows = engine.read([(context, text(i + 1, i)) for i, context in enumerate(contexts)])
    after = engine.read([(context, [i + 9]) for i, context in enumerate(contexts)])
    for i in range(17):
        assert torch.equal(rows[i], alone(engine, text(i + 1, i)))
        assert torch.equal(after[i], alone(engine, [*text(i + 1, i), i + 9]))


def test_a_context_that_was_emptied_is_a_new_one(engine):
    context = engine.start()
    assert context.nbytes == 0
    engine.read([(context, text(130))])
    context.truncate(0)
    assert (context.length, context.nbytes) == (0, 0)
    assert torch.equal(engine.read([(context, text(17))])[0], alone(engine, text(17)))


def test_native_code_refuses_what_python_would_not_give(engine):
    """Tokens beyond the vocabulary, none at all, a context of another length, more than the tables of angles have."""
    context, library = engine.start(), native.library()
    alone(engine, text(3))  # tables of angles
    tables = native.array(native.c_void_p, [table.data_ptr() for table in engine._tables])
    logits = torch.empty(1, engine.vocabulary)

    def status(ids: list[int], count: int, length: int, keep: int = 0, parts: int = 1) -> int:
        held = native.array(native.c_int32, ids)
        part = native.PartStruct(context.handle, native.ctypes.addressof(held), count, length, keep, 1)
        array = native.array(native.PartStruct, [part])
        return library.paley_read(engine.handle, array, parts, tables, engine._positions, logits.data_ptr())

    bad = kernels._STATUS.index("bad argument")
    assert status([260], 1, 0) == status([-1], 1, 0) == bad
    assert status([5], 0, 0) == status([5], -1, 0) == bad
    assert status([5], 1, 1) == status([5], 1, 0, keep=1) == status([5], 1, 0, keep=-1) == bad
    assert status([5], 2**40, 0) == bad
    assert status([5], 1, 0, parts=0) == bad
    assert context.nbytes == 0
    assert status([5], 1, 0) == 0


@pytest.mark.parametrize("piece", [1, 3, 17])
def test_pieces_end_anywhere(engine, piece, monkeypatch):
    """A call is full in the middle of a text."""
    monkeypatch.setattr(engine_module, "_PIECE", piece)
    contexts = [engine.start() for _ in range(3)]
    rows = engine.read([(context, text(n, n)) for context, n in zip(contexts, (5, 1, 18), strict=True)])
    monkeypatch.undo()
    for row, n in zip(rows, (5, 1, 18), strict=True):
        assert torch.equal(row, alone(engine, text(n, n)))
