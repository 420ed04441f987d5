"""`paley serve`: the verb itself, in a process of its own and with bad arguments."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import paley
from command_line import paley_
from paley.cli import serve
from paley.core.errors import PaleyError
from paley.serve.run import listen
from scripted_decoder import chatting
from tiny_models import higgs, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", chatting(tiny_tokenizer))


@pytest.fixture(scope="module")
def quantized(model) -> Path:
    out = model.with_name("quantized")
    paley.quantize(model, higgs(name="higgs-w4a8kv8"), output=out)
    return out


@pytest.fixture
def process(model, quantized) -> Iterator[subprocess.Popen[str]]:
    """The verb, with a model that transformers runs and one for the engine."""
    with subprocess.Popen(
        [
            sys.executable, "-c", "from paley_command import main; main()", "serve", f"first={model}", quantized,
            "--port", "0", "--max-context", "1000",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(paley.__file__).parents[1]), "PYTHONUNBUFFERED": "1"},
    ) as started:  # fmt: skip
        yield started
        started.kill()


def test_it_serves_two_models_and_stops_at_sigterm_in_the_middle_of_their_answers(process, model, quantized):
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.fullmatch(
        r"serving first, quantized at (http://127\.0\.0\.1:\d+) \(for OpenAI's clients: \1/v1\)\n", ready
    )
    assert found, ready
    client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=60)
    listed = {each.id: each.model_extra for each in client.models.list()}
    assert {name: each["context_length"] for name, each in listed.items()} == {"first": 1000, "quantized": 1000}
    folders, lengths = {"first": model, "quantized": quantized}, {"first": 120, "quantized": 900}
    alone = {
        (name, text): paley.generate(str(folders[name]), text, chat=True, max_new_tokens=lengths[name])
        for name in folders for text in ("hi", "ho")
    }  # fmt: skip
    wanted = {key: made.text for key, made in alone.items()}
    assert min(made.tokens for made in alone.values()) == 120

    def ask(name: str, text: str, tokens: int, **more: object) -> Any:
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, temperature=0, **more)

    for name, text in wanted:
        made = ask(name, text, 3).choices[0].message.content
        assert made
        assert wanted[name, text].startswith(made)
    streams = {(name, text): ask(name, text, lengths[name], stream=True) for name, text in wanted}
    for stream in streams.values():
        next(stream)
    process.send_signal(signal.SIGTERM)
    whole = 0
    for key, stream in streams.items():
        answer, error = "", None
        try:
            for chunk in stream:
                answer += chunk.choices[0].delta.content or ""
        except openai.APIError as caught:  # ten seconds were too short for it, on a machine that is busy
            error = caught.message
        assert error in (None, "the server is stopping")
        assert answer == wanted[key] if error is None else wanted[key].startswith(answer)
        whole += error is None
    assert whole > 0  # not cut at once
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "stopped\n")
    client.close()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["no-model"], "no-model: no such folder"),
        (["MODEL", "MODEL"], "would both be called 'tiny'; name one of them: OTHER="),
        (["=MODEL"], "wants NAME=OUT"),
        (["MODEL", "--port", "70000"], "--port"),
        (["MODEL", "--host", "no.such.host.invalid"], "cannot listen there"),
        (["MODEL", "--api-key", " "], "--api-key: is empty"),
        (["MODEL", "--device", "tpu"], "--device tpu: no such device"),
        ([], "Missing argument 'OUT ...'"),
    ],
)
def test_bad_arguments(model, args, complaint):
    typed = [arg.replace("MODEL", str(model)) for arg in args]
    assert complaint in paley_("serve", *typed, *([] if "--port" in typed else ["--port", "0"]), code=2).err


def test_a_port_in_use(model):
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        err = paley_("serve", model, "--port", port, code=2).err
    assert err == f"error: 127.0.0.1:{port}: the port is in use; choose another with --port\n"


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(PaleyError, match=r'fastapi: not installed; pip install "paley\[serve\]"'):
        serve.serve_verb(["m"])
