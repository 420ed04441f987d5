"""The native engine under the scheduler: many clients of OpenAI's own library at once, some of whom hang up."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import openai
import pytest

import paley
from paley.pipeline.opening import TextModel, open_text_model
from paley.serve import Limits, create_app
from scripted_decoder import chatting
from tiny_models import higgs, save_tiny

CLIENTS, EACH = 8, 25
TOKENS = 24  # of an answer, at most
GROWTH = 4 << 20  # bytes that the second half of the requests may add to the process


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> TextModel:
    """Weights, inputs and cache in 4 bits, read by the engine."""
    folder = tmp_path_factory.mktemp("engine")
    save_tiny(folder / "tiny", chatting(tiny_tokenizer), qwen=True, gains=True, max_position_embeddings=256)
    paley.quantize(folder / "tiny", higgs(name="higgs-w4a4kv4"), output=folder / "out")
    made = open_text_model(folder / "out")
    if made.reason is not None:
        pytest.skip(f"needs the engine: {made.reason}")
    return made


def resident() -> int:
    """Bytes of this process that are in memory, without mapped files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def questions() -> list[str]:
    """Of 1 to 90 tokens; many begin alike, so that contexts are taken over from one another."""
    draw = random.Random(0)
    return [("the same beginning " * (n % 4) + "".join(draw.choices("abcdefgh ", k=1 + n)))[:90] for n in range(40)]


def test_eight_clients_get_what_the_engine_alone_says(model, serve_app):
    """To the letter, as its sums have one order whichever texts are read together; and memory stays flat."""
    asked = questions()
    wanted = {text: paley.generate(model, text, chat=True, max_new_tokens=TOKENS).text for text in asked}
    problems: list[tuple[str, str]] = []
    cut: list[str] = []
    sizes: list[int] = []
    half = threading.Barrier(CLIENTS, action=lambda: sizes.append(resident()))

    def client(seed: int, url: str) -> None:
        draw = random.Random(seed)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as c:
            for number in range(EACH):
                if number == EACH // 2:
                    half.wait(60)
                ask(c, draw)

    def ask(c: openai.OpenAI, draw: random.Random) -> None:
        text, way = draw.choice(asked), draw.choice(["whole", "stream", "stream", "cut off"])
        messages = [{"role": "user", "content": text}]
        if way == "whole":
            made = c.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=TOKENS)
            answer = made.choices[0].message.content
        else:
            answer = ""
            pieces = draw.randrange(4) if way == "cut off" else 10**9
            stream = c.chat.completions.create(
                model="m", messages=messages, temperature=0, max_tokens=TOKENS, stream=True
            )
            with stream:
                for number, chunk in enumerate(stream):
                    answer += chunk.choices[0].delta.content or ""
                    if number == pieces:
                        cut.append(text)
                        break
        if answer != wanted[text] and not (way == "cut off" and wanted[text].startswith(answer)):
            problems.append((text, answer))

    app = create_app({"m": model}, limits=Limits(slots=6, queue=10))
    with serve_app(app) as url:
        threads = [threading.Thread(target=client, args=(seed, url)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        sizes.append(resident())
    assert problems == []
    assert len(cut) > 20
    assert len(set(wanted.values())) > 20  # mixed answers would show
    assert sizes[1] - sizes[0] <= GROWTH, sizes
