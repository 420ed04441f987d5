"""`paley push` against a Hub on the loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import paley
from command_line import paley_
from paley.core.errors import PaleyError
from paley.format.digests import seal
from paley.recipe import apply_settings, preset
from paley.recipe.sources import located_source, relative_source
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


def test_nothing_in_a_folder_tells_where_it_was_made(hub, tiny_tokenizer, tmp_path, monkeypatch):
    """Neither as absolute paths, nor by more of the path than the text and the folder have apart."""
    private = tmp_path / "private name"
    text = private / "texts" / "words.txt"
    text.parent.mkdir(parents=True)
    text.write_text("\n\n".join(f"{n} stories of {n * n} words, told {n % 7} times." for n in range(400)))
    model = save_tiny(private / "model", tiny_tokenizer, intermediate_size=64)
    sizes = [f"{part}.{size}" for part in ("calibration", "test") for size in ("sequences=4", "seq_len=32")]
    settings = [f"calibration.source={text}", "search.method=none", "hadamard=16", *sizes]
    made = paley.quantize(model, apply_settings(preset("w4a16"), settings), output=private / "out")
    paley.push(made.output, "me/tiny")
    assert {"plan.json", "results.json", "README.md", "config.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        assert b"private name" not in content, name
    assert json.loads(hub.files["plan.json"])["recipe"]["calibration"]["source"] == "../texts/words.txt"
    assert json.loads(hub.files["results.json"])["evaluation"]["source"] == "../texts/words.txt"
    monkeypatch.chdir(tmp_path.anchor)  # found from the folder, wherever one is
    assert paley.score(made.output).sha256 == made.results.evaluation.sha256
    with pytest.raises(PaleyError, match="was tuned on this text"):
        paley.score(made.output, data=str(text))
    away = private.rename(tmp_path / "other") / "out"
    assert paley.Plan.load(away / "plan.json").recipe.calibration.source == str(tmp_path / "other/texts/words.txt")


def test_a_link_is_not_sent(hub, folder, tmp_path):
    card = folder / "README.md"
    card.rename(tmp_path / "private.md")
    card.symlink_to(tmp_path / "private.md")
    with pytest.raises(PaleyError, match=r"README\.md is a link, and what it leads to would be uploaded"):
        paley.push(folder, "me/tiny")
    assert not hub.files


def test_a_text_elsewhere_is_named_by_its_name_and_never_taken_for_a_file_of_the_folder(tmp_path):
    (tmp_path / "README.md").write_text("the card")
    assert located_source(relative_source("/elsewhere/README.md", tmp_path), tmp_path) == "…/README.md"
    for source in ("self", "pydoc", "hub:set"):
        (tmp_path / source).write_text("words")
        assert located_source(source, tmp_path) == source


def test_a_text_elsewhere_is_named_by_its_name_alone(tmp_path):
    file = Path(__file__).resolve()
    assert relative_source(str(file), Path("/elsewhere/out")) == "…/" + file.name
    assert relative_source("/elsewhere/gone/text.txt", tmp_path) == "…/text.txt"
    for source in ("pydoc", "self", "hub:wikitext::test", "missing.txt"):
        assert relative_source(source, tmp_path) == source


def test_a_folder_of_an_older_paley_that_names_places_is_not_sent(hub, tiny_tokenizer, tmp_path):
    out = paley.quantize(save_tiny(tmp_path / "model", tiny_tokenizer), higgs(), output=tmp_path / "out").output
    plan = json.loads((out / "plan.json").read_text())
    plan["recipe"]["calibration"]["source"] = "/home/someone/text.txt"
    (out / "plan.json").write_text(json.dumps(plan))
    seal(out)
    with pytest.raises(PaleyError, match=r"plan\.json: names a text by its place on this machine, /home/someone/text"):
        paley.push(out, "me/tiny")
    assert not hub.files
