"""Tokens that become text while they come."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paley.core.errors import PaleyError
from paley.pipeline.detokenizing import Detokenizer, StopFinder

TEXTS = ["Grüße, 世界! 👋🏽 done", "a" * 40, " leading and trailing  ", "é", "\n\n\tx", "👩‍👩‍👧"]


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*(text.add(token) for token in ids), text.finish()]


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Bytes where it knows no word, and spaces that the first token of a text loses, as Llama's and Gemma's."""
    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocabulary, merges = {word: index for index, word in enumerate(words)}, [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_break_no_character(tiny_tokenizer, text):
    ids = tiny_tokenizer(text)["input_ids"]
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) == len(text)  # each character as soon as it is whole


def test_bytes_and_spaces_of_sentencepiece(sentencepiece_like):
    ids = sentencepiece_like("a b éb 世 a")["input_ids"]
    found = pieces(sentencepiece_like, ids)
    assert "".join(found) == sentencepiece_like.decode(ids) == "a b éb 世 a"
    assert found[:2] == ["a", " b"]
    assert not any("\ufffd" in piece for piece in found)


def test_bytes_that_are_no_character_do_not_hold_the_text_back(tiny_tokenizer):
    broken = tiny_tokenizer.convert_tokens_to_ids("ÿ")  # the byte 255 begins no character
    found = pieces(tiny_tokenizer, [broken] * 30)
    assert found.index("\ufffd" * 9) == 8
    ids = tiny_tokenizer("ok")["input_ids"]
    assert "".join(pieces(tiny_tokenizer, [broken, *ids])) == "\ufffdok"
    assert pieces(tiny_tokenizer, [broken])[-1] == "\ufffd"


def test_a_text_that_goes_on_keeps_its_first_space(sentencepiece_like):
    ids = sentencepiece_like("a b a")["input_ids"]
    text = Detokenizer(sentencepiece_like, ids[:1])
    assert [text.add(token) for token in ids[1:]] == [" b", " a"]
    assert pieces(sentencepiece_like, ids[1:])[:2] == ["b", " a"]  # one of its own
    lone = sentencepiece_like.convert_tokens_to_ids(["\u2581", "\u2581a"])
    assert "".join(pieces(sentencepiece_like, lone)) == sentencepiece_like.decode(lone) == " a"


def test_what_a_token_would_add_is_what_it_adds(sentencepiece_like, tiny_tokenizer):
    """Spaces of words, as a token alone has none, and characters of several tokens."""
    for tokenizer in (sentencepiece_like, tiny_tokenizer):
        text = Detokenizer(tokenizer)
        for token in tokenizer("a b éb 世")["input_ids"]:
            would = text.would_add(token)
            assert would.replace("\ufffd", "") == text.add(token)
    text = Detokenizer(tiny_tokenizer)
    assert (text.would_add(2), text.name(2), text.name(tiny_tokenizer("a")["input_ids"][0])) == ("", "</s>", "")


@pytest.mark.parametrize("special", [8, 9, 30])
def test_a_character_after_many_special_tokens_is_whole(tiny_tokenizer, special):
    ids = tiny_tokenizer("世👋")["input_ids"]
    assert "".join(pieces(tiny_tokenizer, [3] * special + ids)) == "世👋"
    assert "".join(pieces(tiny_tokenizer, [ids[0], *[3] * 3, *ids[1:]])) == "世👋"
    text = Detokenizer(tiny_tokenizer)
    assert [text.add(3) for _ in range(special)] == [""] * special
    assert text.finish() == ""


def test_special_tokens_have_no_text(tiny_tokenizer):
    ids = tiny_tokenizer("ab")["input_ids"]
    assert pieces(tiny_tokenizer, [1, ids[0], 3, ids[1], 2]) == ["", "a", "", "b", "", ""]


def test_random_text_in_random_tokens(tiny_tokenizer):
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choice("ab é世👋\n") for _ in range(20))
        assert "".join(pieces(tiny_tokenizer, tiny_tokenizer(text)["input_ids"])) == text


def stopped(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    return "".join([*(finder.add(part) for part in parts), finder.finish()]), finder.found


@pytest.mark.parametrize(
    ("stops", "text", "wanted", "found"),
    [
        (["END"], "a EN ENDb", "a EN ", "END"),
        (["END"], "a EN", "a EN", None),
        (["aab"], "aaaab", "aa", "aab"),
        (["b", "ab"], "xab", "x", "ab"),  # the one that begins first
        (["ab", "abc"], "xabc", "x", "ab"),  # the one that is complete first
        ([], "abc", "abc", None),
    ],
)
def test_stop_strings_are_found_however_the_text_is_cut(stops, text, wanted, found):
    assert stopped(stops, list(text)) == (wanted, found)
    for cut in range(1, len(text)):
        whole = stopped(stops, [text[:cut], text[cut:]])
        assert whole[0] == wanted


def test_only_what_may_become_a_stop_string_is_held_back():
    finder = StopFinder(["\nUser:"])
    assert [finder.add(part) for part in ("Hi", "\nUs", "ual", "\nUser: x", "y")] == ["Hi", "", "\nUsual", "", ""]
    with pytest.raises(PaleyError, match="stop: a stop string is empty"):
        StopFinder(["a", ""])
