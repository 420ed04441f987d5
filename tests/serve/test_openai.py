"""OpenAI's own client against the server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from paley.serve import Limits

HI = [{"role": "user", "content": "hi"}]


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


def test_chat(serve):
    with client(serve("grüß dich").url) as c:
        made = c.chat.completions.create(model="scripted", messages=HI, temperature=0)
        assert made.choices[0].message.content == "grüß dich"
        assert made.choices[0].finish_reason == "stop"
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len("user:hi|a>"), 12)
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        assert made.choices[0].logprobs is None
        assert [model.id for model in c.models.list()] == ["scripted", "base"]
        assert c.models.retrieve("scripted").owned_by == "paley"


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_chat_stream_with_usage(serve, seconds):
    """Slow tokens come one by one; what comes faster than anybody reads may come together."""
    with client(serve("grüß", seconds=seconds).url) as c:
        stream = c.chat.completions.create(
            model="scripted", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == "grüß"
    if seconds:
        assert [piece for piece in pieces if piece] == list("grüß")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("stop") == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 7
    assert len({chunk.id for chunk in chunks}) == 1


def test_async_clients_at_once(serve):
    async def ask(c: openai.AsyncOpenAI, n: int) -> str:
        stream = await c.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": str(n)}], stream=True, temperature=0
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as c:
            return await asyncio.gather(*(ask(c, n) for n in range(12)))

    server = serve(lambda ids: ids[5 + len(ids) % 2] if len(ids) < 30 else 2, seconds=0.002)
    answers = asyncio.run(all_of(server.url))
    assert all(set(answer) <= set(f"{n}|") for n, answer in enumerate(answers))
    assert max(map(len, server.decoder.reads)) > 2  # rounds were shared


def test_completions(serve):
    with client(serve("yes, so").url) as c:
        made = c.completions.create(model="scripted", prompt=["a>", "bb>"], n=2, max_tokens=3, temperature=0)
        assert [choice.text for choice in made.choices] == ["yes"] * 4
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
        assert made.choices[0].finish_reason == "length"
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 12)
        by_tokens = c.completions.create(model="scripted", prompt=[70, 66], temperature=0)
        assert by_tokens.usage.prompt_tokens == 2
        streamed = c.completions.create(model="scripted", prompt="a>", stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == "yes, so"
        assert c.completions.create(model="base", prompt="x>").choices[0].text == "more"


def test_logprobs(serve):
    with client(serve("ab").url) as c:
        made = c.chat.completions.create(model="scripted", messages=HI, logprobs=True, top_logprobs=3)
        content = made.choices[0].logprobs.content
        assert [entry.token for entry in content] == ["a", "b", "</s>"]
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
        assert -1e-5 < content[0].logprob < 0
        assert content[0].bytes == [97]
        assert len(content[0].top_logprobs) == 3
        old = c.completions.create(model="scripted", prompt="x>", logprobs=1).choices[0].logprobs
        assert old.tokens == ["a", "b", "</s>"]
        assert old.text_offset == [0, 1, 2]
        assert list(old.top_logprobs[1]) == ["b"]


def test_stop_and_seed(serve):
    server = serve(lambda ids: 10 + (len(ids) * 7) % 90, limit=200)
    with client(server.url) as c:
        first = c.completions.create(model="scripted", prompt="a>", max_tokens=30, temperature=0).choices[0].text
        cut = c.completions.create(
            model="scripted", prompt="a>", max_tokens=30, temperature=0, stop=[first[9:12], "zzzz"]
        )
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (first[:9], "stop")

    with client(serve("yes", peak=1.0).url) as c:

        def drawn(seed: int) -> list[str]:
            made = c.completions.create(
                model="scripted", prompt="a>", max_tokens=9, temperature=2, seed=seed, n=2,
                extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.5},
            )  # fmt: skip
            return [choice.text for choice in made.choices]

        first, again, other = drawn(1), drawn(1), drawn(5)
        assert first == again
        assert len({*first, *other}) == 4


def test_a_chat_that_goes_on_is_not_read_again(serve):
    server = serve("yes")
    with client(server.url) as c:
        c.chat.completions.create(model="scripted", messages=HI)
        longer = [*HI, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}]
        made = c.chat.completions.create(model="scripted", messages=longer)
    assert made.usage.prompt_tokens_details.cached_tokens == len("user:hi|a")
    assert len(server.decoder.contexts) == 1


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"model": "scriptd"}, openai.NotFoundError, "did you mean 'scripted'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"model": "base"}, openai.BadRequestError, "has no chat template"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError, "has 308 tokens.*holds 100"),
        (
            {"max_tokens": 91},
            openai.BadRequestError,
            "10 tokens and 91 for the answer.*holds 100; set max_tokens to 90",
        ),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p=0.*above 0"),
        ({"n": 99}, openai.BadRequestError, "n: "),
        ({"stop": ["a", ""]}, openai.BadRequestError, "none of them empty"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "tools: is not supported",
        ),
        ({"top_logprobs": 2}, openai.BadRequestError, "needs logprobs"),
        ({"extra_body": {"top_q": 1}}, openai.BadRequestError, "top_q: is not supported"),
    ],
)
def test_what_is_not_understood_is_refused(serve, request_, error, words):
    with (
        client(serve("yes", limit=100).url) as c,
        pytest.raises(error, match=words) as caught,
    ):
        c.chat.completions.create(**{"model": "scripted", "messages": HI} | request_)
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_context_may_be_shorter_than_the_models(serve):
    """`Limits.context`, `--max-context` of the verb: prompt and answer together."""
    url = serve(lambda ids: 70, limit=100, limits=Limits(context=30)).url
    with client(url) as c:
        assert c.models.retrieve("scripted").model_extra["context_length"] == 30
        made = c.chat.completions.create(model="scripted", messages=HI)
        assert (made.usage.total_tokens, made.choices[0].finish_reason) == (30, "length")
        with pytest.raises(openai.BadRequestError, match=r"has 10 tokens and 21 for the answer.*holds 30; set max_tok"):
            c.chat.completions.create(model="scripted", messages=HI, max_tokens=21)
        assert c.completions.create(model="scripted", prompt="x" * 29, max_tokens=1).usage.total_tokens == 30
        with pytest.raises(openai.BadRequestError, match=r"has 30 tokens.*holds 30; shorten the prompt") as caught:
            c.completions.create(model="scripted", prompt="x" * 30, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key_is_refused(serve):
    url = serve("yes", api_key="right").url
    for key in ("wrong", "right2", "righ"):
        with client(url, key) as c, pytest.raises(openai.AuthenticationError, match="wrong API key"):
            c.models.list()
    with client(url, "right") as c:
        assert c.chat.completions.create(model="scripted", messages=HI).choices[0].message.content == "yes"
