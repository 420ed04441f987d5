"""The public door: `import paley`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import paley
from command_line import paley_
from paley import hf


def test_every_promised_name_is_there():
    assert all(hasattr(paley, name) for name in paley.__all__)


def test_the_version_is_that_of_pyproject():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert paley.__version__ == pyproject["project"]["version"]


def test_hadamard_is_the_function():
    h = paley.hadamard(12).int()
    assert torch.equal(h @ h.T, 12 * torch.eye(12, dtype=torch.int32))


def test_register_makes_the_format_known_to_transformers():
    paley.register()
    assert AUTO_QUANTIZER_MAPPING["paley"] is hf.PaleyQuantizer


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        paley.quantise  # noqa: B018


HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "datasets", "matplotlib")
LIGHT = {
    "import paley": "import paley; dir(paley)",
    **{
        args: f"from paley_command import main; sys.argv[1:] = {args.split()}; main()"
        for args in (
            "--version", "--help", "quantize --help", "sensitivity --help", "quantise m", "quantize m", "eval m --fast",
            "generate m p --temperature hot",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_heavy_is_imported_before_it_is_needed(name):
    """--help and a mistyped option take a fraction of a second, not that of torch and transformers."""
    code = f"""if True:
        import atexit, resource, sys
        def report():
            used = resource.getrusage(resource.RUSAGE_SELF)
            found = [name for name in {HEAVY} if name in sys.modules]
            print("LOADED", found, used.ru_utime + used.ru_stime)
        atexit.register(report)
        {LIGHT[name]}"""
    source = str(Path(paley.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip
    assert done.returncode == (2 if " m" in name else 0), done.stderr
    loaded, _, seconds = done.stdout.partition("LOADED ")[2].rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) < 2.5  # some .4 where nothing else is at work; with torch 6.6


def test_a_mistyped_option_is_one_line():
    err = paley_("quantize", "m", code=2).err
    assert err == "error: Missing option '--output'; see `paley quantize --help`\n"


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("w9a4", "W9 has no grid"),
        ("no.yaml", "no such recipe"),
        (Path("no"), "no such recipe"),
        (None, "recipe or a plan"),
    ],
)
def test_a_recipe_may_be_a_name_or_a_file(tmp_path, recipe, complaint):
    with pytest.raises(paley.PaleyError, match=complaint):
        paley.quantize(tmp_path, recipe, output=tmp_path / "out")
