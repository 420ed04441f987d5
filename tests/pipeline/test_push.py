"""`paley push` against a Hub on the loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

import paley
from command_line import paley_
from tiny_models import higgs, save_tiny


class Hub(ThreadingHTTPServer):
    """Takes one commit of small files, as the Hub does; `files` and `card` tell what came."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.made: dict = {}
        self.token = "hf_right"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self._answer({"url": f"{self.server.url}/me/tiny", "name": "me/tiny"})
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            self._answer(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in asked]}
            )
        elif self.path.endswith("/commit/main"):
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                else:
                    self.server.made |= entry["value"]
            url = f"{self.server.url}/me/tiny/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "me/tiny", "sha": "1" * 40, "siblings": []})

    def _answer(self, data: dict, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", made.token)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    save_tiny(tmp_path / "model", tiny_tokenizer)
    paley.quantize(tmp_path / "model", higgs(), output=tmp_path / "out")
    return tmp_path / "out"


def test_what_paley_wrote_arrives_and_nothing_else(hub, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("# My own card\n")
    told = paley_("push", folder, "me/tiny", "--private", "--message", "first")
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt"}
    assert hub.files == written
    assert hub.files["README.md"] == b"# My own card\n"
    assert (hub.made["name"], hub.made["summary"]) == ("tiny", "first")
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True  # by the library's version
    assert f"{len(written)} files" in told.out
    assert f"{hub.url}/me/tiny/commit/" in told.out
    assert "left out, as Paley did not write them: notes.txt" in told.err
    assert json.loads(paley_("push", folder, "me/tiny", "--json").out)["repository"] == "me/tiny"


def test_a_damaged_folder_is_not_sent(hub, folder):
    (folder / "plan.json").write_text("{}")
    assert "plan.json" in paley_("push", folder, "me/tiny", code=2).err
    assert not hub.made


def test_what_the_hub_refuses_names_the_way_out(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in paley_("push", folder, "me/tiny", code=2).err
    assert "OWNER/NAME" in paley_("push", folder, "no//name", code=2).err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be uploaded" in paley_("push", folder, "me/tiny", code=2).err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in paley_("push", folder, "me/tiny", code=2).err
    assert not hub.files
