"""The house's floors: no import goes up, core needs torch alone, and no file is unpickled.

The picture is in docs/architecture.md. Imports inside functions and for types alone count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

# A unit is a folder or a file right under src/paley, or a script beside it; "__init__" is the public door.
FLOORS = {
    **dict.fromkeys(("arch", "core"), 1),
    **dict.fromkeys(("recipe", "plan", "sensitivity", "data", "methods", "ops", "format", "kernels", "results"), 2),
    **dict.fromkeys(("model", "runtime"), 3),
    "eval": 4,
    **dict.fromkeys(("pipeline", "hf", "export", "vllm_plugin"), 5),
    **dict.fromkeys(("cli", "serve", "report", "__init__", "paley_command"), 6),
}

# Units of one floor do not know each other, but for these: (who, whom): why.
EXCEPTIONS = {
    ("arch", "core.errors"): "a family without a row is refused like any bad input",
    ("methods", "kernels"): "the native loops of GPTQ take codebooks, which no operation of torch does",
    ("ops", "kernels"): "the native library is one of an op's products",
    ("plan", "recipe"): "a plan holds the recipe that it decides for",
    ("results", "recipe"): "it is read and written by the same functions as a recipe and a plan",
    ("sensitivity", "recipe"): "it is read and written by the same functions as a recipe and a plan",
    ("cli", "__init__"): "the command line is a guest of the public door",
    ("serve", "__init__"): "the server is a guest of the public door",
    ("cli", "serve"): "a verb starts the server",
    ("cli", "report"): "a verb writes the page",
    ("report", "__init__"): "a page tells the version that wrote it",
    ("paley_command", "cli"): "the console script runs the command line",
    ("pipeline", "hf"): "what was saved is reloaded the way a user loads it",
}

MAY_IMPORT = {"core": sys.stdlib_module_names | {"torch"}, "arch": sys.stdlib_module_names}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
UNPICKLING = {"torch.load", "torch.serialization.load", "torch.jit.load"}


def unit_of(module: str) -> str:
    """'paley.core.grids' -> 'core'; 'paley' -> '__init__'; a script is its own unit."""
    package, *rest = module.split(".")
    return package if package != "paley" else [*rest, "__init__"][0]


def files(source: Path) -> Iterator[tuple[str, ast.Module]]:
    """(dotted module name, syntax tree) of each file of the package below `source`, and of the scripts beside it."""
    for path in sorted([*source.glob("*.py"), *(source / "paley").rglob("*.py")]):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name of the module or object) of each import, also by importlib with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def lazy(tree: ast.Module) -> set[int]:
    """The lines of the imports that wait for a function's call."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {line for function in functions for line, _ in imports(function)}


def target_unit(imported: str) -> str:
    """The unit behind 'paley.core.grids.load', 'paley.plan', or a name of the public door, 'paley.load'."""
    parts = imported.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in FLOORS else "__init__"


def excepted(unit: str, imported: str) -> bool:
    """Whether EXCEPTIONS lets the unit import this from another one of its floor."""
    module = ".".join(imported.split(".")[1:3])
    return (unit, target_unit(imported)) in EXCEPTIONS or (unit, module) in EXCEPTIONS


def broken_floors(source: Path) -> list[str]:
    """One line for each import that the floors forbid."""
    found = []
    scripts = {path.stem for path in source.glob("*.py")}
    for module, tree in files(source):
        unit = unit_of(module)
        if unit not in FLOORS:
            found.append(f"{module}: {unit!r} is on no floor; give it one in FLOORS")
            continue
        for line, imported in imports(tree):
            where = f"{module}:{line}: imports {imported}"
            if imported.startswith("."):
                found.append(f"{where}, relative; write the whole name")
            elif imported.partition(".")[0] in scripts:
                found.append(f"{where}, a script, which nothing imports")
            elif imported.partition(".")[0] == "paley":
                if unit in scripts and line not in lazy(tree):
                    found.append(f"{where} at its top; import it in a function, where Ctrl-C is quiet")
                other = target_unit(imported)
                here, there = FLOORS[unit], FLOORS.get(other)
                if there is None:
                    found.append(f"{where}, which is on no floor")
                elif there > here:
                    found.append(f"{where}, from floor {here} up to floor {there}")
                elif there == here and other != unit and not excepted(unit, imported):
                    found.append(f"{where}, across floor {here}; move what both need down")
            elif unit in MAY_IMPORT and imported.partition(".")[0] not in MAY_IMPORT[unit]:
                found.append(f"{where}, but {'core needs torch' if unit == 'core' else 'arch is data'} alone")
    return found


def unpickling(source: Path) -> list[str]:
    """One line for each place that imports pickle or something built on it, or loads a file through it."""
    found = []
    for module, tree in files(source):
        for line, imported in imports(tree):
            if imported.partition(".")[0] in PICKLES or imported in UNPICKLING:
                found.append(f"{module}:{line}: imports {imported}")
        nodes = list(ast.walk(tree))
        short = {a.asname: a.name for n in nodes if isinstance(n, ast.Import) for a in n.names if a.asname}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                first, _, rest = ast.unparse(node).partition(".")
                if f"{short.get(first, first)}.{rest}" in UNPICKLING:
                    found.append(f"{module}:{node.lineno}: uses {ast.unparse(node)}")
    return found


def test_imports_go_down_only():
    assert list(files(SOURCE)), f"no source below {SOURCE}"
    assert broken_floors(SOURCE) == []


def test_the_console_script_is_read_too():
    assert unit_of("paley_command") in {unit_of(module) for module, _ in files(SOURCE)} & FLOORS.keys()


def test_nothing_is_unpickled():
    assert unpickling(SOURCE) == []


def plant(source: Path, text: dict[str, str]) -> Path:
    for name, code in text.items():
        path = source / "paley" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    return source


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("core/a.py", "from paley.model import fold", "from floor 1 up to floor 3"),
        ("core/a.py", "import numpy as np", "core needs torch alone"),
        ("core/a.py", "from paley import quantize", "from floor 1 up to floor 6"),
        ("core/a.py", "from paley.arch import family", "across floor 1"),
        ("arch/a.py", "import torch", "arch is data alone"),
        ("arch/a.py", "from paley.core.transforms import Transform", "across floor 1"),
        ("arch/a.py", "from paley.model import adapter", "from floor 1 up to floor 3"),
        ("ops/a.py", "from paley.format import spec", "across floor 2"),
        ("kernels/a.py", "from paley.ops import matmul", "across floor 2"),
        ("ops/a.py", "from paley.model import linear", "from floor 2 up to floor 3"),
        (
            "core/a.py",
            "def f():\n    import paley.hf",
            "core.a:2: imports paley.hf, from floor 1 up to floor 5",
        ),
        ("model/a.py", "import importlib\nimportlib.import_module('paley.eval.perplexity')", "up to floor 4"),
        ("model/a.py", "if TYPE_CHECKING:\n    from paley.pipeline import Run", "up to floor 5"),
        ("model/a.py", "from . import fold", "relative"),
        ("format/spec.py", "from paley.recipe import Recipe", "across floor 2"),
        ("recipe/models.py", "from paley.plan import Plan", "across floor 2"),
        ("data/texts.py", "from paley import sensitivity", "across floor 2"),
        ("eval/a.py", "from paley.attic import f", "on no floor"),
        ("attic.py", "", "'attic' is on no floor"),
        ("../paley_attic.py", "", "'paley_attic' is on no floor"),
        ("../paley_command.py", "from paley.cli import app", "paley.cli.app at its top"),
        ("../paley_command.py", "def main():\n    from paley.pipeline import run\n    import paley", "across floor 6"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, code, complaint):
    (found,) = broken_floors(plant(tmp_path, {file: code}))
    assert complaint in found


def test_nothing_imports_the_console_script(tmp_path):
    planted = {"../paley_command.py": "", "cli/a.py": "def f():\n    from paley_command import main"}
    (found,) = broken_floors(plant(tmp_path, planted))
    assert found == "paley.cli.a:2: imports paley_command.main, a script, which nothing imports"


def test_what_the_floors_allow_passes(tmp_path):
    allowed = {
        "core/a.py": "import torch\nfrom importlib import resources\nfrom paley.core import grids",
        "arch/a.py": "import dataclasses\nfrom paley.core.errors import PaleyError\nfrom paley.arch import row",
        "ops/a.py": "import torch\nfrom paley import kernels\nfrom paley.core import planes",
        "plan.py": "from paley.recipe.models import Recipe\nfrom paley.core.errors import PaleyError",
        "model/fold.py": "import transformers\nfrom paley.model.adapter import Block\nfrom paley import plan",
        "__init__.py": "from paley.pipeline import quantize",
        "cli.py": "import paley\nfrom paley import pipeline",
        "../paley_command.py": "import os\ndef main():\n    from paley.cli import app",
    }
    assert broken_floors(plant(tmp_path, allowed)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "import torch\nx = torch.load('f')",
        "import torch as t\nx = t.load('f')",
        "from torch import load",
        "import torch\nload = torch.jit.load",
    ],
)
def test_planted_unpickling_is_found(tmp_path, code):
    assert len(unpickling(plant(tmp_path, {"core/a.py": code}))) == 1
    assert len(unpickling(plant(tmp_path, {"../script.py": code}))) == 2


def test_importing_paley_leaves_the_extras_alone():
    """matplotlib and datasets are extras, and slow to import: nobody who does not use them pays for them."""
    door = SOURCE / "paley" / "__init__.py"
    if not (door.is_file() and door.read_text(encoding="utf-8").strip()):
        pytest.skip("paley/__init__.py has nothing in it yet")
    code = "import sys, paley; print(*sorted({'matplotlib', 'datasets'} & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SOURCE)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
