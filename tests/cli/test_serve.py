"""`paley serve`: the verb itself, in a process of its own and with bad arguments."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import paley
from command_line import paley_
from paley.cli import serve
from paley.core.errors import PaleyError
from paley.serve.run import listen
from scripted_decoder import chatting
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", chatting(tiny_tokenizer))


def test_it_serves_and_stops_at_sigterm_in_the_middle_of_an_answer(model):
    process = subprocess.Popen(
        [sys.executable, "-c", "from paley_command import main; main()", "serve", f"first={model}", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(paley.__file__).parents[1]), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.fullmatch(r"serving first at (http://127\.0\.0\.1:\d+) \(for OpenAI's clients: \1/v1\)\n", ready)
    assert found, ready
    connection = http.client.HTTPConnection(found[1].removeprefix("http://"), timeout=60)
    body = {"model": "first", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    wanted = paley.generate(str(model), "hi", chat=True, max_new_tokens=3).text
    assert answer["choices"][0]["message"]["content"] == wanted
    body |= {"stream": True, "max_tokens": 300}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.read(20)
    process.send_signal(signal.SIGTERM)
    assert response.read().decode().endswith("data: [DONE]\n\n")  # to its end
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "stopped\n")
    connection.close()


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
