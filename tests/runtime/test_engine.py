"""The engine against the transformers path: families, schemes, and every way of reading."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from typing import Any

import pytest
import torch
from engine_models import quantized

import paley
from paley.core.errors import PaleyError
from paley.kernels import matmul, native
from paley.model import kv_cache
from paley.model.decoder import ModelDecoder
from paley.pipeline.opening import open_decoder
from paley.runtime import Engine, why_not
from paley.runtime import engine as engine_module
from paley.runtime.support import CHECKED

TEXT = [1, *range(10, 48)]
SCHEMES = {
    "w4a16": "higgs-w4a16",
    "higgs-4": "higgs-4",
    "trellis": "w3a8kv8",
    "w4a8kv8": "higgs-w4a8kv8",
    "w4a4kv4": "higgs-w4a4kv4",
    "w3a3kv3": "higgs-w3a3kv3",
    "k4v2": "higgs-w4a16k4v2",
}


def read(decoder: Any, tokens: list[int], context: Any = None) -> torch.Tensor:
    return decoder.read([(context or decoder.start(), tokens)])[0]


@pytest.fixture
def cache_of_16_bits(monkeypatch):
    """The transformers path keeps an unquantized cache in float32, the engine in float16."""
    append = kv_cache._Side.append

    def halves(side: Any, x: torch.Tensor, base: Any = None) -> None:
        append(side, x.half().float() if side.scheme is None else x, base)

    monkeypatch.setattr(kv_cache._Side, "append", halves)


def errors(engine: Any, reference: Any) -> list[float]:
    """The greatest error of logits relative to their spread: token by token, and of longer and longer texts."""
    one, same, found = engine.start(), reference.start(), []

    def compare(a: torch.Tensor, b: torch.Tensor) -> None:
        found.append(float((a - b).abs().max() / b.std()))

    for at, token in enumerate(TEXT):
        compare(read(engine, [token], one), read(reference, [token], same))
        if at % 8 == 7:
            compare(read(engine, TEXT[: at + 1]), read(reference, TEXT[: at + 1]))
    return sorted(found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("qwen", [False, True])
def test_logits_are_those_of_transformers(tmp_path, tiny_tokenizer, qwen, scheme, cache_of_16_bits, monkeypatch):
    """To 1e-3 of their spread until some value lies on the edge of a rounding step and falls to the other side.

    Sums have another order on each machine, so that happens anywhere; all later tokens read that value in the cache.
    """
    folder = quantized(tmp_path, tiny_tokenizer, SCHEMES[scheme], qwen=qwen)
    reference = ModelDecoder(paley.load(folder, product="dense"))
    monkeypatch.setattr(matmul, "plan", lambda *_: None)  # else weights and inputs are rounded to integers
    found = errors(Engine.open(folder, threads=2), reference)
    assert found[len(found) // 4] < 1e-3
    assert found[-1] < 0.25


@pytest.mark.parametrize("scheme", ["w4a16", "higgs-4", "trellis"])
def test_integers_add_little(tmp_path, tiny_tokenizer, scheme):
    """Far less than the rounding of the weights."""
    folder = quantized(tmp_path, tiny_tokenizer, SCHEMES[scheme], qwen=True)
    engine = Engine.open(folder, threads=2)
    assert all(product.startswith("integers") for product in engine.program.products.values())
    found = errors(engine, ModelDecoder(paley.load(folder, product="dense")))
    assert found[len(found) // 2] < 0.1


@pytest.mark.parametrize("family", CHECKED)
def test_families(tmp_path, tiny_tokenizer, family, cache_of_16_bits, monkeypatch):
    folder = quantized(tmp_path, tiny_tokenizer, "higgs-w4a16kv8", family=family)
    assert why_not(folder) is None
    reference = ModelDecoder(paley.load(folder, product="dense"))
    monkeypatch.setattr(matmul, "plan", lambda *_: None)
    found = errors(Engine.open(folder, threads=2), reference)
    assert found[len(found) // 2] < 1e-2  # some of the many values of the cache fall on the other side of a step
    assert found[-1] < 0.1


@pytest.mark.parametrize(("heads", "more"), [(3, 1.0), (4, 1.25)])
def test_a_cache_has_the_bytes_that_its_bits_say(tmp_path, tiny_tokenizer, heads, more):
    """Of 16 values a head; those of 12 are filled up to what is read at a time."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads}
    folder = quantized(tmp_path, tiny_tokenizer, "higgs-w4a4kv4", qwen=True, **changes)
    engine, held = Engine.open(folder, threads=2), ModelDecoder(paley.load(folder))
    context, same = engine.start(), held.start()
    read(engine, TEXT, context)
    read(held, TEXT, same)
    assert same.nbytes <= context.nbytes <= more * same.nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return quantized(tmp_path_factory.mktemp("qwen"), tiny_tokenizer, "higgs-w4a4kv4", qwen=True)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.open(folder, threads=2)


def test_threads_and_neighbours_change_no_bit(folder, engine):
    wanted = read(engine, TEXT)
    assert wanted.dtype == torch.float32
    for threads in (1, 3):
        other = Engine.open(folder, threads=threads)
        a, b = other.start(), other.start()
        rows = other.read([(b, TEXT[5:9]), (a, TEXT)])
        assert torch.equal(rows[1], wanted)
        assert torch.equal(rows[0], read(engine, TEXT[5:9]))
        assert (a.length, b.length) == (39, 4)
        assert a.nbytes > b.nbytes > 0


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_text_in_pieces_is_the_text(engine, piece, monkeypatch):
    """Over several pages and segments; to the bit."""
    monkeypatch.setattr(engine_module, "_PIECE", 100)
    text = [(7 * i) % 250 + 5 for i in range(300)]
    context = engine.start()
    for at in range(0, 300, piece):
        last = read(engine, text[at : at + piece], context)
    assert torch.equal(last, read(engine, text))


def test_truncating_forgets_the_end(engine):
    context = engine.start()
    read(engine, TEXT[:6], context)
    held = context.nbytes
    read(engine, [77] * 90, context)
    context.truncate(6)
    assert (context.length, context.nbytes) == (6, held)
    assert torch.equal(read(engine, TEXT[6:], context), read(engine, TEXT))
    with pytest.raises(PaleyError, match="holds 39 tokens, got 40"):
        context.truncate(40)
    context.truncate(0)
    assert torch.equal(read(engine, TEXT, context), read(engine, TEXT))


def test_what_cannot_be_read_is_refused(engine, folder):
    context = engine.start()
    assert (engine.vocabulary, engine.limit) == (260, 512)
    for tokens in ([], [-1], [260]):
        with pytest.raises(PaleyError, match="one or more tokens from 0 to 259"):
            read(engine, tokens, context)
    with pytest.raises(PaleyError, match="beyond the 512"):
        read(engine, [5] * 513, context)
    for parts in ([], [(context, [5]), (context, [6])]):
        with pytest.raises(PaleyError, match="no context twice"):
            engine.read(parts)
    with pytest.raises(PaleyError, match="the engine that started it"):
        Engine.open(folder).read([(context, [5])])
    assert context.length == 0
    context.close()
    context.close()
    with pytest.raises(PaleyError, match="was closed"):
        read(engine, [5], context)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_read_that_stops_midway_changes_no_context(engine, stop, monkeypatch):
    contexts = [engine.start() for _ in range(3)]
    engine.read([(contexts[0], TEXT[:12]), (contexts[1], TEXT[:3])])
    monkeypatch.setattr(engine_module, "_PIECE", 16)
    calls, call = 0, native.call

    def fail(*arguments: Any) -> None:
        nonlocal calls
        call(*arguments)
        calls += arguments[0].__name__ == "paley_read"
        if calls == 2:
            raise stop

    monkeypatch.setattr(native, "call", fail)
    with pytest.raises(stop):
        engine.read([(contexts[0], TEXT[12:]), (contexts[1], TEXT[3:20]), (contexts[2], TEXT)])
    assert [context.length for context in contexts] == [12, 3, 0]
    monkeypatch.undo()
    after = engine.read([(contexts[0], TEXT[12:]), (contexts[1], TEXT[3:20]), (contexts[2], TEXT)])
    assert torch.equal(after[0], read(engine, TEXT))
    assert torch.equal(after[1], read(engine, TEXT[:20]))
    assert torch.equal(after[2], after[0])


def test_two_engines_in_threads_of_one_process(folder, engine):
    wanted, found = read(engine, TEXT), {}

    def run(index: int) -> None:
        mine = Engine.open(folder, threads=2)
        found[index] = [read(mine, TEXT) for _ in range(20)]
        mine.close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(row, wanted) for rows in found.values() for row in rows)


def test_a_closed_engine_says_so(folder):
    mine = Engine.open(folder, threads=2)
    context = mine.start()
    mine.close()
    mine.close()
    with pytest.raises(PaleyError, match="engine: it was closed"):
        mine.start()
    with pytest.raises(PaleyError, match="engine: it was closed"):
        read(mine, [5], context)
    with pytest.raises(PaleyError, match="threads must be 1 to 256, got 0"):
        Engine.open(folder, threads=0)


def test_the_portable_code_has_the_same_meaning(folder, engine, monkeypatch):
    wanted = read(engine, TEXT)
    monkeypatch.setattr(native, "best_planes_level", lambda: "portable")
    found = read(Engine.open(folder, threads=2), TEXT)
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.std())


@pytest.mark.parametrize("bits", ["k2v7", "k3v6", "k4v5", "k5v4", "k6v3", "k7v2", "k8v8"])
def test_codes_of_every_width_are_read_alike(tmp_path, tiny_tokenizer, bits, monkeypatch):
    """As floats, as heads of 12 values are: the same logits but for their last bits, over two pages.

    What multiplies codes as integers has a test of its own, test_native_attention.py. In some texts a value lies on the
    edge of a rounding step and falls to the other side; not in all of them.
    """
    folder = quantized(tmp_path, tiny_tokenizer, f"higgs-w4a16{bits}", qwen=True)
    texts = [[(factor * i) % 250 + 5 for i in range(70)] for factor in (3, 7, 11, 13)]
    found = []
    for level in (native.best_planes_level(), "portable"):
        monkeypatch.setattr(native, "best_planes_level", lambda level=level: level)
        mine = Engine.open(folder, threads=2)
        found.append([read(mine, text) for text in texts])
    apart = [float((a - b).abs().max() / b.std()) for a, b in zip(*found, strict=True)]
    assert min(apart) < 1e-4
    assert max(apart) < 0.25


def test_memory_stays_flat(engine):
    """Contexts come and go; what they hold is given back."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def some() -> None:
        for _ in range(30):
            context = engine.start()
            engine.read([(context, TEXT * 10)])
            context.truncate(5)
            for token in TEXT[:5]:
                engine.read([(context, [token])])

    some()
    gc.collect()
    before = resident()
    some()
    gc.collect()
    assert resident() - before < 2**21


def test_generate_takes_the_engine_where_it_can(folder, tmp_path, tiny_tokenizer):
    assert why_not(folder) is None
    assert isinstance(open_decoder(folder), Engine)
    other = quantized(tmp_path, tiny_tokenizer, "higgs-4", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert why_not(other) == "RoPE that follows the length of the text is not supported"
    assert isinstance(open_decoder(other), ModelDecoder)
    with pytest.raises(PaleyError, match="does not run this model: RoPE"):
        Engine.open(other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number, got 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"sliding_window": 8, "layer_types": None}, "sliding_window without layer_types"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks a setting"),
        ({"rope_parameters": {"rope_type": "default"}}, "lacks a setting"),
    ],
)
def test_a_config_that_the_engine_cannot_follow_is_left_to_transformers(folder, change, reason, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    assert re.search(reason, why_not(other) or "")
