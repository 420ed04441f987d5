"""`paley chat`, with lines from a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import paley
from paley.cli import app
from scripted_decoder import chatting
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat") / "model", chatting(tiny_tokenizer))


def chat(model: Path, typed: str, *args: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["chat", str(model), "--max-new-tokens", "8", *args], input=typed)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_lines_from_a_pipe_are_answered(model):
    out, err = chat(model, "hello\nyou\n\n/stats\n", "--temperature", "0")
    assert out.count("\n") >= 2
    assert "in the cache)" in err
    wanted = paley.generate(str(model), "hello", chat=True, max_new_tokens=8).text
    assert out.startswith(wanted + "\n")


def test_commands(model):
    _, err = chat(model, "/stats\n/system Be brief.\n/rest\n/zzz\n/help\n/reset\n/exit\nnever read\n")
    assert err.splitlines()[:4] == [
        "nothing was answered yet",
        "forgotten; the model is told: Be brief.",
        "/rest: no such command; did you mean '/reset'?",
        "/zzz: no such command; /help lists them",
    ]
    assert "/stats" in err
    assert err.endswith("forgotten; the model is told: Be brief.\n")


def test_a_question_that_is_too_long_is_no_end(model):
    _, err = chat(model, "x" * 3000 + "\n/exit\n")
    assert "error: the conversation has 30" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--top-p", "2"], "--top-p 2.0: must be above 0 and at most 1"),
        (["--temperature", "-1"], "'--temperature': Input should be greater than or equal to 0"),
        (["--stop", ""], "--stop: a stop string is empty"),
    ],
)
def test_bad_options_are_told_before_anything_is_typed(model, args, complaint):
    assert complaint in chat(model, "", *args, code=2)[1]


def test_generate_reads_stdin_and_chats(model):
    args = ["generate", str(model), "-", "--chat", "--json", "--max-new-tokens", "5", "--stop", "zz", "--top-k", "5"]
    result = CliRunner().invoke(app, args, input="hello\n")
    found = json.loads(result.stdout)
    assert (found["prompt"], found["tokens"]) == ("hello", 5)
    assert found["prompt_tokens"] == len("user:hello|a>")
    bad = CliRunner().invoke(app, args, input=b"\xff")
    assert (bad.exit_code, bad.stderr) == (2, "error: stdin: is not UTF-8 text (byte 0); convert it, with iconv\n")


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tiny_tokenizer) -> Path:
    """A model that has room for a minute's answer, and never ends one."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    save_tiny(folder, chatting(tiny_tokenizer), max_position_embeddings=32768)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][2] = 0  # </s>
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_program(endless):
    command = [sys.executable, "-c", "from paley_command import main; main()", "chat", str(endless)]
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(paley.__file__).parents[1]), "TERM": "dumb"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "30000", "--temperature", "0"], stdin=follower, stdout=follower, stderr=follower,
        env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    shown = ""

    def until(text: str, key: bytes = b"") -> None:
        """Reads what is shown until `text` was, or anything; presses `key` every three seconds."""
        nonlocal shown
        deadline, press = time.monotonic() + 120, time.monotonic()
        while not shown or text not in shown:
            assert time.monotonic() < deadline, shown[-2000:]
            if key and time.monotonic() >= press:
                os.write(leader, key)
                press += 3
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 4096).decode(errors="replace")
        shown = shown.partition(text)[2] if text else shown

    try:
        until("> ")
        os.write(leader, b"hello\n")
        until("hello\r\n")
        until("")  # a key that comes before the answer begins gives up the line
        until("stopped; what came so far is remembered", key=b"\x03\x03\x03")
        until("Ctrl-D or /exit ends", key=b"\x03")
        until("> ")
        os.write(leader, b"/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
