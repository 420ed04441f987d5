"""What an answer tells of its tokens."""

from __future__ import annotations

import json
import urllib.request

from paley.pipeline.continuation import Chance, Drawn
from paley.serve.shapes import Choice, CompletionShape


def answer(url: str, asked: dict) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read().decode()


def test_tokens_and_offsets_of_logprobs_belong_to_the_text(serve):
    """Characters of several tokens, and text that is held back until it is no stop string."""
    url = serve("aé世ENxENDy").url
    asked = {"model": "scripted", "prompt": "a>", "temperature": 0, "max_tokens": 50, "logprobs": 1, "stop": ["END"]}
    made = json.loads(answer(url, asked))["choices"][0]
    text, logprobs = made["text"], made["logprobs"]
    assert text == "aé世ENx"
    assert "".join(logprobs["tokens"]) == "aé世ENxEND"
    assert logprobs["tokens"][:7] == ["a", "", "é", "", "", "世", "E"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]
    lines = answer(url, asked | {"stream": True}).split("\n\n")
    parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(part["text"] for part in parts) == text
    for name, values in logprobs.items():
        assert [each for part in parts for each in (part["logprobs"] or {name: []})[name]] == values


def test_of_tokens_with_the_same_text_the_likelier_is_told():
    drawn = Drawn(7, "a", 0, -0.1, (Chance(7, -0.1, "a"), Chance(8, -2.5, "b"), Chance(9, -3.0, "a")))
    made = CompletionShape("m", 3).whole([Choice("a", [drawn], "stop")], {})["choices"][0]
    assert made["logprobs"]["top_logprobs"] == [{"a": -0.1, "b": -2.5}]
