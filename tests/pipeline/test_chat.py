"""`paley.Chat`: what is remembered, what is read anew, and what happens when an answer is interrupted."""

from __future__ import annotations

import pytest

import paley
from paley.pipeline.conversation import chat_ids
from scripted_decoder import chatting, scripted_model


def test_a_chat_remembers_and_reads_only_what_is_new(tiny_tokenizer):
    model, decoder = scripted_model(chatting(tiny_tokenizer), "yes")
    chat = paley.Chat(model, system="be brief")
    seen: list[str] = []
    assert chat.say("really", write=seen.append).text == "yes"
    assert "".join(seen) == "yes"
    second = chat.say("still")
    assert chat.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "really"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "still"},
        {"role": "assistant", "content": "yes"},
    ]
    assert second.reused_tokens == len("system:be brief|user:really|a")
    assert second.prompt_tokens == len("system:be brief|user:really|assistant:yes|user:still|a>")
    assert len(decoder.contexts) == 1
    assert chat.kv_cache_bytes > 0
    chat.close()
    assert decoder.open == []


def test_reset_keeps_the_system_prompt_alone(tiny_tokenizer):
    model, _ = scripted_model(chatting(tiny_tokenizer), "yes")
    chat = paley.Chat(model, system="be brief")
    chat.say("a")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert chat.say("b").prompt_tokens == len("system:be brief|user:b|a>")


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_answer_is_kept_as_far_as_it_came(tiny_tokenizer, after):
    model, decoder = scripted_model(chatting(tiny_tokenizer), "yes, surely")
    chat = paley.Chat(model)
    decoder.interrupt_after = after
    with pytest.raises(KeyboardInterrupt):
        chat.say("a")
    said = [message["content"] for message in chat.messages]
    assert said == (["a", "yes"] if after else [])
    assert chat.say("b").text == "yes, surely"
    assert len(decoder.open) == 1


def test_answers_end_where_the_context_does(tiny_tokenizer):
    model, _ = scripted_model(chatting(tiny_tokenizer), "yes, surely", limit=28)
    chat = paley.Chat(model, max_new_tokens=20)
    first = chat.say("0123456789")
    assert (first.text, first.finish) == ("yes, surel", "length")  # after 18 tokens of a prompt
    with pytest.raises(paley.PaleyError, match=r"conversation has .* tokens, and this model reads 28"):
        chat.say("more")
    assert len(chat.messages) == 2


def test_models_that_cannot_chat_are_refused(tiny_tokenizer):
    model, _ = scripted_model(tiny_tokenizer, "yes")
    with pytest.raises(paley.PaleyError, match="has no chat template"):
        paley.Chat(model)
    tokenizer = chatting(tiny_tokenizer)
    with pytest.raises(paley.PaleyError, match=r"does not take these messages .unknown role tool."):
        chat_ids(tokenizer, [{"role": "tool", "content": ""}])
    for template in ("{{ messages[99].content }}", "{% if %}", "{{ 1 + 'a' }}", ""):
        tokenizer.chat_template = template
        with pytest.raises(paley.PaleyError, match="chat template"):
            chat_ids(tokenizer, [{"role": "user", "content": ""}])


def test_generate_puts_the_template_around_a_question(tiny_tokenizer):
    model, _ = scripted_model(chatting(tiny_tokenizer), "yes")
    made = paley.generate(model, "so", chat=True, system="s")
    assert (made.text, made.prompt_tokens) == ("yes", len("system:s|user:so|a>"))
