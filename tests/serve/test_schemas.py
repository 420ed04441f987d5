"""Answers that follow a JSON schema, with OpenAI's own client."""

from __future__ import annotations

import functools
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

HI = [{"role": "user", "content": "hi"}]


class Ticket(BaseModel):
    title: Literal["late", "lost"]
    numbers: list[int]
    urgent: bool


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def asked(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_a_model_of_pydantic(serve):
    with client(serve("yes", peak=0.0).url) as c:  # every token is as likely: only the schema makes JSON of them
        made = c.chat.completions.parse(model="scripted", messages=HI, response_format=Ticket, n=3, seed=1)
    for choice in made.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Ticket)
    assert len({choice.message.content for choice in made.choices}) > 1


def test_the_model_chooses_within_the_schema(serve):
    schema = {"enum": ["no", "yes", "perhaps"]}
    with client(serve('"yes"').url) as c:
        made = c.chat.completions.create(
            model="scripted", messages=HI, response_format=asked(schema), temperature=0, logprobs=True
        )
        assert made.choices[0].message.content == '"yes"'
        assert made.usage.completion_tokens == 5  # the end follows from the schema, and is not read
        assert all(-1e-5 < entry.logprob < 0 for entry in made.choices[0].logprobs.content)
        free = c.chat.completions.create(model="scripted", messages=HI, response_format={"type": "text"})
        assert free.choices[0].message.content == '"yes"'


def test_any_object_in_a_stream_beside_free_answers(serve):
    text = '{"a": [1, {"b": "grüß"}]}'
    with client(serve(text).url) as c:
        stream = c.chat.completions.create(
            model="scripted", messages=HI, response_format={"type": "json_object"}, stream=True
        )
        other = c.chat.completions.create(model="scripted", messages=HI)
        made = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(made) == json.loads(text)
    assert other.choices[0].message.content == text


def test_no_blanks_without_end_and_a_cut_in_the_middle(serve):
    with client(serve(" " * 200, peak=9.0).url) as c:  # a model that would write nothing but blanks
        made = c.chat.completions.create(
            model="scripted", messages=HI, response_format=asked(Ticket.model_json_schema()), max_tokens=12
        )
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].message.content.startswith('{"title": "l')


def test_a_number_ends_where_the_model_ends_it(serve):
    with client(serve("42").url) as c:
        made = c.chat.completions.create(
            model="scripted", messages=HI, response_format=asked({"type": "integer"}), temperature=0
        )
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("42", "stop")


@pytest.mark.parametrize(
    ("format_", "words"),
    [
        (asked({"type": "strin"}), "not supported.*strin.*json_object"),
        (asked({"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
        (asked({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (asked({"$ref": "http://127.0.0.1/schema"}), "does not fetch"),
        (asked({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "not supported \\(NoExtensionBias\\)"),
        (asked(functools.reduce(lambda inner, _: {"items": inner}, range(300), {})), "recursion limit"),
        ({"type": "json_schema"}, "response_format.*json_schema"),
        ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, "response_format.*json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "grammar"}, "response_format.type"),
    ],
)
def test_a_schema_that_is_not_supported_is_refused(serve, format_, words):
    with client(serve("yes").url) as c:
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            c.chat.completions.create(model="scripted", messages=HI, response_format=format_)
        assert caught.value.body["type"] == "invalid_request_error"
        assert c.chat.completions.create(model="scripted", messages=HI).choices[0].message.content == "yes"
