"""Writes docs/python.md: examples, then every name of `paley.__all__` with what its docstring says."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, fill, indent
from types import FunctionType
from typing import Any

from pydantic import BaseModel

import paley

OUT = Path(__file__).resolve().parents[1] / "docs" / "python.md"
HEAD = """\
# Paley from Python

`import paley` is light: a name is imported when it is first used. Errors of input are `paley.PaleyError`. Made by
`python tools/make_python_page.py`: the reference below is the docstrings.

```python
import paley
from transformers import AutoTokenizer

made = paley.quantize("path/to/model", "w4a16", output="OUT")  # or a Recipe, a Plan, a recipe's file
print(made.results.bits_per_weight, made.results.evaluation)
print(paley.score("OUT", against="path/to/model").kl)

model = paley.load("OUT")  # a transformers model; after paley.register() AutoModelForCausalLM does it, too
cache = paley.PackedKVCache(model)
tokens = AutoTokenizer.from_pretrained("OUT")("Once upon a time", return_tensors="pt")
model.generate(**tokens, **paley.cache_argument(model, cache))
```

```python
chat = paley.Chat("OUT", system="You are brief.", sampling=paley.Sampling(temperature=0.7, top_p=0.95))
print(chat.say("What is a lattice?").text)
print(chat.say("And in one word?").reused_tokens)  # the cache of the first answer was kept
```

A model can be opened once for many calls, and the server is an ASGI application, for other servers than `paley serve`:

```python
from paley.pipeline.opening import open_text_model
from paley.serve import Limits, create_app

model = open_text_model("OUT")
for prompt in ("One", "Two"):
    print(paley.generate(model, prompt, stop=["\\n"]).text)
app = create_app({"small": model}, limits=Limits(slots=4))
```

`paley.report.gather(folder, original)` gives a report's figures as data, `paley.report.write_page([report], file)`
writes the page. The [guide](guide.md) shows the same on the command line, and [fine-tuning](guide.md#4-fine-tune).
"""
SECTIONS = {
    "Quantize": "quantize estimate make_plan preset load_recipe measure_sensitivity Recipe Plan Sensitivity Monitor",
    "Use": "load register PackedKVCache cache_argument generate Chat Sampling lora_config",
    "Measure and look": "score evaluate inspect verify bench doctor",
    "Give away": "dequantize export_to push",
    "Results": "Outcome Results EvalResult Estimate Generated Inspection Verified Bench Doctor Exported Pushed",
    "Other": "PaleyError hadamard __version__",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts.extend(f"\n{entry(name, getattr(paley, name))}\n" for name in names.split())
    return "".join(parts)


def entry(name: str, value: Any) -> str:
    """A heading, how it is called, what it says of itself; of a class also what it has."""
    if not callable(value):
        return f'### `{name}`\n\nA text, such as "{value}".'
    if is_record(value):
        has = fill(f"Has {', '.join(f'`{field}`' for field in fields(value))}.", 120)
        lines = [f"### `{name}`", "", text(value), "", has]
    else:
        lines = [f"### `{name}`", "", f"```\n{called(name, value)}\n```", "", text(value)]
    if inspect.isclass(value) and (members := list(listed(value))):
        lines += ["", *members]
    return "\n".join(lines)


def called(name: str, value: Any) -> str:
    """Names and defaults, without types; over 100 characters a line for each group of parameters."""
    signature = inspect.signature(value)
    shown = [shown_parameter(each) for each in signature.parameters.values()]
    kinds = [each.kind for each in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    gives = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(shown)}){gives}"
    return line if len(line) <= 100 else f"{name}(\n{indent(filled(shown), '    ')}\n){gives}"


def shown_parameter(parameter: inspect.Parameter) -> str:
    """A default that is a function has no short name."""
    default = parameter.default
    if default is inspect.Parameter.empty:
        return str(parameter.replace(annotation=inspect.Parameter.empty))
    return f"{parameter.name}={'...' if isinstance(default, FunctionType) else repr(default)}"


def filled(words: list[str]) -> str:
    """Lines of up to 96 characters, each word followed by a comma."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 94:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word},"
    return "\n".join(lines)


def is_record(value: Any) -> bool:
    """Whether a class only holds values that others fill in."""
    return inspect.isclass(value) and (
        issubclass(value, BaseModel) or (dataclasses.is_dataclass(value) and value is not paley.Sampling)
    )


def fields(value: Any) -> list[str]:
    """Of a dataclass or a document."""
    if issubclass(value, BaseModel):
        return list(value.model_fields)
    return [field.name for field in dataclasses.fields(value)]


def listed(value: type) -> Iterator[str]:
    """A line for each public method and property of a class, with the first sentence of its docstring."""
    for name, member in vars(value).items():
        if isinstance(member, property):
            shown, function = f".{name}", member.fget
        elif isinstance(member, FunctionType | classmethod | staticmethod):
            function = getattr(member, "__func__", member)
            names = [str(each) for each in inspect.signature(function).parameters][
                not isinstance(member, staticmethod) :
            ]
            shown = f".{name}({', '.join(names)})"
        else:
            continue
        if not name.startswith("_") and function is not None and function.__doc__:
            yield f"- `{shown}`: {' '.join(function.__doc__.split())}"


def text(value: Any) -> str:
    """A docstring without its indentation."""
    first, _, rest = (value.__doc__ or "").strip().partition("\n")
    return f"{first}\n{dedent(rest)}".rstrip()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    OUT.write_text(page())


if __name__ == "__main__":
    main()
