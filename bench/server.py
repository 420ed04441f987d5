"""How fast does `paley serve` answer 1, 4 and 8 clients, beside the engine alone and `transformers serve`?

Each client asks with OpenAI's own client, in streams, one request after the other. Seconds to the first token, and
tokens a second of all clients together, are medians of rounds in which the servers take turns; one that has nothing to
answer sleeps. Prompts differ from their first word on, so that no server has read them before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
from bench.record import RESULTS, provenance, save
from transformers import AutoTokenizer

from paley.pipeline.generate import generate
from paley.pipeline.opening import open_text_model

CLIENTS = (1, 4, 8)
WORDS = ("river", "north", "country", "people", "trade", "winter", "bridge", "letter", "garden", "king", "ship")


def question(number: int) -> str:
    """Some 60 tokens, and another text for each number."""
    words = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(45)]
    return f"{number}: tell me a long story about {' '.join(words)}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[openai.OpenAI]:
    """-> a client of the server that the command starts, when it answers."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        deadline = time.monotonic() + 300
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{' '.join(command)} does not answer:\n{log.read_text()[-2000:]}")
                time.sleep(0.5)
        yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(client: openai.OpenAI, model: str, number: int, new: int) -> tuple[float, str]:
    """-> (seconds to the first text, the whole text)."""
    start, first, text = time.perf_counter(), 0.0, ""
    for chunk in client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question(number)}], max_tokens=new, temperature=0,
        stream=True,
    ):  # fmt: skip
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            text += chunk.choices[0].delta.content
    return first, text


def round_of(
    answer: Callable[[int], tuple[float, str]], clients: int, requests: int, numbers: Iterator[int], count: Any
) -> dict[str, float]:
    """Clients that ask `requests` times each, at once -> median seconds to the first token, tokens a second of all."""
    found: list[tuple[float, str]] = []
    asked = [[next(numbers) for _ in range(requests)] for _ in range(clients)]

    def client(mine: list[int]) -> None:
        found.extend([answer(number) for number in mine])

    threads = [threading.Thread(target=client, args=(mine,)) for mine in asked]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if len(found) < clients * requests:
        sys.exit("a client failed; its error is above")
    tokens = sum(count(text) for _, text in found)
    return {
        "first_token_seconds": statistics.median(first for first, _ in found),
        "tokens_per_second": tokens / seconds,
    }


def alone(model: Any, number: int, new: int) -> tuple[float, str]:
    """As `ask`, of the engine without a server."""
    start, first = time.perf_counter(), list[float]()
    made = generate(
        model, question(number), chat=True, max_new_tokens=new,
        write=lambda _: first or first.append(time.perf_counter() - start),
    )  # fmt: skip
    return first[0] if first else time.perf_counter() - start, made.text


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a quantized folder of a chat model")
    parser.add_argument("--original", type=Path, help="for transformers serve; without it only the engine is beside")
    parser.add_argument("--dtype", default="auto", help="of transformers serve")
    parser.add_argument("--batching", action="store_true", help="transformers serve with --continuous-batching")
    parser.add_argument("--requests", type=int, default=3, help="of each client in a round")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "server.json")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    tokenizer = AutoTokenizer.from_pretrained(args.folder)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers: dict[str, Callable[[int], tuple[float, str]]] = {}
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        code = "import sys; from paley_command import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", f"it={args.folder}", "--port", str(port)]
        client = stack.enter_context(serving(command, port, logs / "paley"))
        answers["paley"] = lambda number: ask(client, "it", number, args.new)
        if args.original is not None:
            other_port = free_port()
            beside = Path(sys.executable).with_name("transformers")
            found = str(beside) if beside.exists() else shutil.which("transformers")
            command = [str(found), "serve", str(args.original), "--port", str(other_port), "--dtype", args.dtype]
            command += ["--continuous-batching"] if args.batching else []
            other = stack.enter_context(serving(command, other_port, logs / "transformers"))
            answers["transformers"] = lambda number: ask(other, str(args.original), number, args.new)
        model = open_text_model(args.folder)
        numbers = iter(range(10**9))
        answers["alone"] = lambda number: alone(model, number, args.new)
        for answer in answers.values():  # warm up
            answer(next(numbers))
        kept: dict[str, list[dict[str, float]]] = {}
        for _, clients in itertools.product(range(args.rounds), CLIENTS):
            for name, answer in answers.items():
                if name == "alone" and clients > 1:
                    continue
                made = round_of(answer, clients, args.requests, numbers, count)
                kept.setdefault(f"{name} {clients}", []).append(made)
                print(name, clients, made, flush=True)
    found = {name: medians(rounds) for name, rounds in kept.items()}
    rate = {name: entry["tokens_per_second"] for name, entry in found.items()}
    ratios = {"to the engine alone, 1 client": rate["paley 1"] / rate["alone 1"]}
    if args.original is not None:
        ratios |= {f"to transformers, {n} clients": rate[f"paley {n}"] / rate[f"transformers {n}"] for n in CLIENTS}
    save(
        provenance() | {
            "folder": args.folder.name, "engine": model.engine, "requests": args.requests, "new_tokens": args.new,
            "rounds": args.rounds, "transformers_serve": {"dtype": args.dtype, "batching": args.batching},
            "load": [before, os.getloadavg()[0]], "measured": found, "ratios": ratios,
        },
        args.output,
    )  # fmt: skip
    print(ratios)


if __name__ == "__main__":
    main()
