"""The decoder on a transformers model: rows, rewinding, truncating, limits."""

from __future__ import annotations

import pytest
import torch

import paley
from paley.core.errors import PaleyError
from paley.model.decoder import ModelDecoder
from tiny_models import higgs, save_tiny

TEXT = list(range(10, 40))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def decoder(request, tmp_path_factory, tiny_tokenizer) -> ModelDecoder:
    """A quantized model with a 3-bit cache; Gemma's first layer sees 8 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(folder / "model", tiny_tokenizer, gemma=request.param == "gemma", max_position_embeddings=64)
    paley.quantize(model, higgs(name="higgs-w4a16kv3"), output=folder / "out")
    return ModelDecoder(paley.load(folder / "out"))


def read(decoder: ModelDecoder, tokens: list[int]) -> torch.Tensor:
    return decoder.read([(decoder.start(), tokens)])[0]


def test_logits_are_those_of_one_forward(decoder):
    with torch.no_grad():
        wanted = decoder.model(torch.tensor([TEXT]), use_cache=False).logits[0, -1]
    assert read(decoder, TEXT).dtype == torch.float32
    torch.testing.assert_close(read(decoder, TEXT), wanted, atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(decoder):
    a, b = decoder.start(), decoder.start()
    together = decoder.read([(a, TEXT), (b, TEXT[5:9])])
    assert torch.equal(together[0], read(decoder, TEXT))
    assert torch.equal(together[1], read(decoder, TEXT[5:9]))
    assert (a.length, b.length) == (30, 4)
    assert a.nbytes > b.nbytes > 0


def test_a_text_in_pieces_is_the_text(decoder):
    context = decoder.start()
    for at in range(0, 30, 7):
        last = decoder.read([(context, TEXT[at : at + 7])])[0]
    torch.testing.assert_close(last, read(decoder, TEXT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_read_that_stops_midway_changes_no_context(decoder, stop):
    contexts = [decoder.start() for _ in range(3)]
    decoder.read([(contexts[0], TEXT[:12]), (contexts[1], TEXT[:3])])
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first two contexts have read, the third only in its first layer
            raise stop

    last = [m for m in decoder.model.modules() if type(m).__name__.endswith("DecoderLayer")][1]
    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(stop):
        decoder.read([(contexts[0], TEXT[12:]), (contexts[1], TEXT[3:20]), (contexts[2], TEXT)])
    hook.remove()
    assert [context.length for context in contexts] == [12, 3, 0]
    after = decoder.read([(contexts[0], TEXT[12:]), (contexts[1], TEXT[3:20]), (contexts[2], TEXT)])
    whole = decoder.start(), decoder.start()
    decoder.read([(whole[0], TEXT[:12]), (whole[1], TEXT[:3])])
    again = decoder.read([(whole[0], TEXT[12:]), (whole[1], TEXT[3:20])])
    assert torch.equal(after[:2], again)
    assert torch.equal(after[2], read(decoder, TEXT))


def test_truncating_forgets_the_end(decoder):
    context = decoder.start()
    decoder.read([(context, TEXT[:6])])
    held = context.nbytes
    decoder.read([(context, [77])])
    context.truncate(6)
    assert (context.length, context.nbytes) == (6, held)
    torch.testing.assert_close(decoder.read([(context, TEXT[6:])])[0], read(decoder, TEXT), atol=1e-4, rtol=1e-4)
    with pytest.raises(PaleyError, match="holds 30 tokens, got 31"):
        context.truncate(31)
    if decoder.model.config.model_type == "gemma3_text":
        with pytest.raises(PaleyError, match="cannot go back"):
            context.truncate(5)
    else:
        context.truncate(0)
        assert torch.equal(decoder.read([(context, TEXT)])[0], read(decoder, TEXT))


def test_what_cannot_be_read_is_refused(decoder):
    context = decoder.start()
    assert (decoder.vocabulary, decoder.limit) == (260, 64)
    for tokens in ([], [-1], [260]):
        with pytest.raises(PaleyError, match="one or more tokens from 0 to 259"):
            decoder.read([(context, tokens)])
    with pytest.raises(PaleyError, match="beyond the 64"):
        decoder.read([(context, [5] * 65)])
    for parts in ([], [(context, [5]), (context, [6])]):
        with pytest.raises(PaleyError, match="no context twice"):
            decoder.read(parts)
    assert context.length == 0
    context.close()
    context.close()
    with pytest.raises(PaleyError, match="was closed"):
        decoder.read([(context, [5])])
