"""`paley verify`: one line, the speed in it, exit code 2 for damage."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from paley.cli import app
from paley.pipeline import quantize
from tiny_models import higgs, save_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("model")
    return quantize(save_tiny(root / "model", tiny_tokenizer), higgs(), output=root / "out").output


def run(*arguments):
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_sound_folder_takes_one_line(made):
    code, out, _ = run(made)
    assert code == 0
    assert re.fullmatch(rf"{made}: 8 files as written; [\d,]+ bytes; [\d,]+ MB/s\n", out)


def test_what_was_added_is_named(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "out")
    (folder / "notes.txt").write_text("x")
    (folder / "README.md").write_text("x")
    code, out, _ = run(folder)
    assert code == 0
    assert out.endswith("; edited: README.md; not covered: notes.txt\n")
    code, out, _ = run(folder, "--json")
    assert json.loads(out)["not_covered"] == ["notes.txt"]


@pytest.mark.parametrize("place", [-1, 20_000])
def test_damage_ends_in_exit_code_2_and_names_the_tensor(made, tmp_path, place):
    folder = shutil.copytree(made, tmp_path / "out")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    code, out, error = run(folder)
    assert (code, out) == (2, "")
    assert re.search(r"error: .*model\.safetensors: \S+\.(codes|scales) is not as written", error)
    assert len([text for text in error.splitlines() if text.startswith("error")]) == 1


def test_a_folder_that_is_none(tmp_path):
    assert run(tmp_path)[0] == 2
    assert "no such folder" in run(tmp_path / "none")[2]
