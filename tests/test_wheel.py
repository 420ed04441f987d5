"""The wheel: scripts/wheel.sh builds it with kernels and shows that it works (--long); here without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_without_a_compiler_it_is_for_every_platform(tmp_path):
    for name in ("csrc", "src"):
        ignored = shutil.ignore_patterns("__pycache__", "libpaley.*", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run(
        [*command, str(tmp_path / "source")], check=True, capture_output=True,
        env=environment | {"CC": "/nonexistent", "CXX": "/nonexistent"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    package = {name for name in package if not any(part in name for part in ("__pycache__", "libpaley", ".egg-info"))}
    assert held == package


@pytest.mark.long
def test_it_works_where_no_source_is():
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(["bash", "scripts/wheel.sh"], cwd=ROOT, check=True, env=environment)
