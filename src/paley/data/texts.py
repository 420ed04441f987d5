"""Documents from a source: a local file, Python's documentation, or a data set of the hub."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants

from paley.core.errors import PaleyError, Setting, nearest_name

__all__ = ["documents"]

PASSAGE_CHARACTERS = 2000
# Enough for any calibration here. Reading a whole hub data set such as C4 would take days.
HUB_CHARACTERS = 20_000_000
SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n\s*\n")
HUB_GRAMMAR = "hub:DATASET[:CONFIG][:SPLIT] (hub:DATASET::SPLIT where there is no CONFIG)"
WAY_OUT = ("use a text file (", Setting("source", "FILE"), ") or the source `pydoc`")


def documents(source: str) -> list[str]:
    """The non-empty documents of a text file, a .jsonl file, `pydoc`, or `hub:DATASET[:CONFIG][:SPLIT]`."""
    if source == "self":
        raise PaleyError("source 'self' is text that the model samples: hand its ids to blocks_from_ids")
    if source == "pydoc":
        texts: Iterable[str] = python_documentation()
    elif source.startswith("hub:"):
        texts = _hub_documents(source)
    elif source.endswith(".jsonl"):
        texts = _jsonl_documents(source)
    else:
        texts = split_documents(_read(source))
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise PaleyError("holds no text", where=source, remedy=WAY_OUT)
    return kept


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = nearest_name(source, ["pydoc", "self", "hub:"])
        raise PaleyError(f"{source}: no such text file; give a file, `pydoc` or {HUB_GRAMMAR}{hint}") from None
    except IsADirectoryError:
        raise PaleyError(f"{source}: is a folder, expected a text file") from None
    except UnicodeDecodeError as error:
        raise PaleyError(
            f"{source}: is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8 first"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PaleyError(f"{source}: cannot be read ({error})") from None


def split_documents(text: str) -> list[str]:
    """Documents between <|endoftext|> lines; without such lines, passages of at least PASSAGE_CHARACTERS."""
    if SEPARATOR.search(text):
        return [document.strip("\n") for document in SEPARATOR.split(text)]
    blank_lines = BLANK_LINES.search(text.strip()) is not None
    paragraphs = BLANK_LINES.split(text) if blank_lines else text.split("\n")
    return join_passages(paragraphs, "\n\n" if blank_lines else "\n")


def join_passages(paragraphs: Iterable[str], separator: str) -> list[str]:
    """Joins whole paragraphs to passages of at least PASSAGE_CHARACTERS; a short rest is added to the last one."""
    passages: list[str] = []
    current: list[str] = []
    length = 0
    for paragraph in paragraphs:
        paragraph = paragraph.strip("\n")
        if not paragraph.strip():
            continue
        current.append(paragraph)
        length += len(paragraph) + len(separator)
        if length - len(separator) >= PASSAGE_CHARACTERS:
            passages.append(separator.join(current))
            current, length = [], 0
    if current and passages:
        passages[-1] = separator.join([passages[-1], *current])
    elif current:
        passages.append(separator.join(current))
    return passages


def _jsonl_documents(source: str) -> list[str]:
    """The "text" of each line's object."""
    texts = []
    for number, line in enumerate(_read(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PaleyError(f"{source}, line {number}: is not JSON ({error.msg})") from None
        texts.append(_row_text(row, f"{source}, line {number}"))
    return texts


def _row_text(row: object, where: str) -> str:
    if not isinstance(row, dict):
        raise PaleyError(f'{where}: expected an object with a "text" field, got {type(row).__name__}')
    text = row.get("text")
    if not isinstance(text, str):
        keys = ", ".join(map(repr, row)) or "none"
        raise PaleyError(f'{where}: expected a string field "text", got {type(text).__name__}; fields are {keys}')
    return text


def _hub_documents(source: str) -> list[str]:
    """Rows of a hub data set. If some are blank, the rows are lines of one text: then passages of that text."""
    name, config, split = _hub_parts(source)
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise PaleyError(
            "hub data sets need the `datasets` package",
            where=source,
            remedy=("pip install 'paley[data]', or ", *WAY_OUT),
        ) from None
    offline = constants.HF_HUB_OFFLINE
    rows, characters = [], 0
    try:
        # Streaming reads only what is needed; offline, only a complete cached copy works.
        for row in library.load_dataset(name, config, split=split, streaming=not offline):
            rows.append(_row_text(row, source))
            characters += len(rows[-1])
            if characters >= HUB_CHARACTERS:
                break
    except PaleyError:  # it is a ValueError too, but has a good message already
        raise
    except (OSError, ValueError) as error:
        state = "HF_HUB_OFFLINE is set and no cached copy serves" if offline else "the hub gave no such text"
        raise PaleyError(f"{state} ({error})", where=source, remedy=WAY_OUT) from error
    if any(not row.strip() for row in rows):
        return split_documents("\n".join(rows))
    return rows


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """-> data set, config or None, split (default: train)."""
    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise PaleyError(f"{source}: expected {HUB_GRAMMAR}")
    name, config, split = [*parts, "", ""][:3]
    return name, config or None, split or "train"


@functools.cache
def python_documentation() -> tuple[str, ...]:
    """The language reference's topics and the standard library's docstrings, in the order of their names.

    Topics quote one another at length. Only the first copy of a paragraph is kept, so that roles stay disjoint.
    The text depends on the version of Python.
    """
    named = {f"{name} module": text for name, text in _library_docstrings()}
    try:
        named |= importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        if not named:
            raise PaleyError("pydoc: this Python comes without documentation; use a text file") from None
    seen: set[str] = set()
    texts = []
    for name in sorted(named):
        paragraphs = {" ".join(p.split()): p for p in BLANK_LINES.split(named[name])}
        texts.append("\n\n".join(text for key, text in paragraphs.items() if key and key not in seen))
        seen.update(paragraphs)
    return tuple(text for text in texts if len(text) >= 200)


def _library_docstrings() -> Iterator[tuple[str, str]]:
    """(module, all its docstrings) for each single-file module of the standard library."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if path.stem not in sys.stdlib_module_names:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        yield path.stem, "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
