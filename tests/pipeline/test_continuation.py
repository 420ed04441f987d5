"""The loop that continues a text, and the pool of contexts that a text can go on from."""

from __future__ import annotations

import math

import pytest

import paley
from paley.pipeline.continuation import ContextPool, Continuation, step
from paley.pipeline.sampling import Sampling
from scripted_decoder import scripted_model


def test_a_text_ends_at_its_end_token(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, "héllo wörld")
    seen: list[str] = []
    made = paley.generate(model, "say>", max_new_tokens=50, write=seen.append)
    assert (made.text, made.finish) == ("héllo wörld", "stop")
    assert "".join(seen) == made.text
    assert (made.prompt_tokens, made.tokens) == (4, 14)  # 13 bytes and </s>
    assert made.kv_cache_bytes == 10 * (4 + 13)  # the last token is not read
    assert decoder.reads[0] == [tiny_tokenizer("say>")["input_ids"]]
    assert decoder.open == []


def test_a_text_ends_at_its_length_with_whole_characters(tiny_tokenizer):
    model, _ = scripted_model(tiny_tokenizer, "ab€")
    made = paley.generate(model, ">", max_new_tokens=4)
    assert (made.text, made.finish, made.tokens) == ("ab\ufffd", "length", 4)


def test_a_stop_string_is_no_part_of_the_text(tiny_tokenizer):
    model, _ = scripted_model(tiny_tokenizer, "one two three")
    made = paley.generate(model, ">", stop=["zzz", "two", "o t"])
    assert (made.text, made.finish) == ("one ", "stop")
    assert paley.generate(model, ">", stop=["three!"]).text == "one two three"


def test_a_stop_string_in_what_was_held_back_is_the_reason_of_the_end(tiny_tokenizer):
    """Half a character is told when nothing more comes."""
    model, _ = scripted_model(tiny_tokenizer, "ab€")
    made = paley.generate(model, ">", stop=["b\ufffd"], max_new_tokens=3)
    assert (made.text, made.finish) == ("a", "stop")
    assert paley.generate(model, ">", stop=["b\ufffd!"], max_new_tokens=3).finish == "length"


def test_drawn_tokens_have_the_text_that_they_add(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, "é€")
    text = Continuation(model, tiny_tokenizer(">")["input_ids"], sampling=Sampling(), max_new_tokens=4)
    while text.finish is None:
        step(decoder, [text])
    assert [(drawn.text, drawn.offset) for drawn in text.drawn] == [("", 0), ("é", 0), ("", 1), ("\ufffd", 1)]


def test_a_long_prompt_is_read_in_pieces(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, "x")
    prompt = "p" * 600 + ">"
    assert paley.generate(model, prompt).text == "x"
    assert [len(part[0]) for part in decoder.reads] == [256, 256, 89, 1]


def test_several_texts_share_rounds_and_keep_apart(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, lambda ids: ids[0] if len(ids) < 6 else 2)
    texts = [
        Continuation(model, prompt, sampling=Sampling(), max_new_tokens=9)
        for prompt in ([tiny_tokenizer("a")["input_ids"][0]], tiny_tokenizer("bbb")["input_ids"])
    ]
    parts = ["", ""]
    while going := [n for n in (0, 1) if texts[n].finish is None]:
        for n, piece in zip(going, step(decoder, [texts[n] for n in going]), strict=True):
            parts[n] += piece
    assert parts == ["aaaaa", "bbb"]
    assert len(decoder.reads[0]) == 2
    assert len(decoder.reads[-1]) == 1


def test_chances_are_told_if_wanted(tiny_tokenizer):
    model, decoder = scripted_model(tiny_tokenizer, "a")
    text = Continuation(model, [5], sampling=Sampling(), max_new_tokens=1, logprobs=2)
    step(decoder, [text])
    (drawn,) = text.drawn
    assert drawn.logprob == pytest.approx(-math.log(1 + 259 * math.exp(-20.0)), abs=1e-9)
    assert drawn.top[0] == (drawn.token, drawn.logprob, drawn.text)
    assert len(drawn.top) == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_new_tokens": 9}, r"^max_new_tokens=9: with a prompt of 2 tokens .* more than the 10 .*max_new_tokens=8"),
        ({"max_new_tokens": 5, "system": "s"}, "belongs to a chat"),
        ({"max_new_tokens": 5, "chat": True}, "has no chat template"),
        ({"max_new_tokens": 5, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 5, "stop": [""]}, "empty"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny_tokenizer, options, complaint):
    model, decoder = scripted_model(tiny_tokenizer, "x", limit=10)
    with pytest.raises(paley.PaleyError, match=complaint):
        paley.generate(model, "a>", **options)
    assert decoder.reads == []


def put(pool: ContextPool, decoder, ids: list[int]):
    context = decoder.start()
    context.ids = list(ids)
    pool.put(context, ids)
    return context


def test_a_text_that_goes_on_takes_its_context(tiny_tokenizer):
    _, decoder = scripted_model(tiny_tokenizer, "x")
    pool = ContextPool(decoder, 2)
    first = put(pool, decoder, [1, 2, 3, 4])
    assert pool.nbytes == 40
    taken = pool.take([1, 2, 3, 9, 9])
    assert taken is first
    assert taken.ids == [1, 2, 3]
    pool.put(taken, [1, 2, 3])
    again = pool.take([1, 2, 3])  # the last token is read anew, for its logits
    assert (again, again.length) == (first, 2)


def test_a_context_is_left_to_the_text_that_shares_most_of_it(tiny_tokenizer):
    _, decoder = scripted_model(tiny_tokenizer, "x")
    pool = ContextPool(decoder, 2)
    longer, shorter = put(pool, decoder, [1, 2, 3, 4, 5]), put(pool, decoder, [1, 2, 7])
    fresh = pool.take([1, 8, 8, 8])
    assert fresh.length == 0
    assert pool.take([1, 2, 3, 4, 6]) is longer
    assert pool.take([1, 2, 9]) is shorter


def test_the_context_used_longest_ago_goes_first(tiny_tokenizer):
    _, decoder = scripted_model(tiny_tokenizer, "x")
    pool = ContextPool(decoder, 2)
    contexts = [put(pool, decoder, [n] * 3) for n in (4, 5, 6)]
    assert [context.closed for context in contexts] == [True, False, False]
    pool.close()
    assert decoder.open == []


def test_a_context_that_cannot_go_back_is_replaced(tiny_tokenizer):
    _, decoder = scripted_model(tiny_tokenizer, "x", fixed=True)
    pool = ContextPool(decoder, 2)
    old = put(pool, decoder, [1, 2, 3])
    assert pool.take([1, 2, 9]).length == 0
    assert old.closed
