"""Presets: a method is a packaged YAML file with placeholders for bits; a name such as `w3a3kv3` fills them in."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paley.core import grids, tables, trellis
from paley.core.errors import PaleyError, Setting, nearest_name
from paley.core.grids import MAX_BITS, MAX_POINTS, MIN_BITS
from paley.core.packing import stored_bits
from paley.recipe.loading import load_recipe, yaml_value
from paley.recipe.models import Budget, Recipe
from paley.recipe.targets import TARGETS, target
from paley.recipe.validation import problems, validate

__all__ = ["LISTED", "MEASURED", "as_recipe", "examples", "measured", "preset", "preset_methods", "under_budget"]

PATTERN = "[METHOD-]W<bits>[G<group size>]A<bits>[KV<bits> or K<bits>V<bits>][E<bits>][H<bits>]"
GRAMMAR = (
    f"{PATTERN}, for example w3a3kv3, w4g64a16e6h6, w4a16k4v2 or "
    "quarot-w4a4kv4; w4a4.5kv4: 4.5 bits of inputs on average, by a budget; "
    "w1a4 or w1a16: binary weights with a grouping bit, KV4 unless said otherwise; "
    "or (higgs|balanced)-<bits>[E<bits>][H<bits>], for example balanced-4 or higgs-3.25: weights alone, without data"
)
_CACHE = r"(?:kv(?P<kv>\d{1,4})|k(?P<k>\d{1,4})v(?P<v>\d{1,4}))?"
_OUTER = r"(?:e(?P<e>\d{1,4}))?(?:h(?P<h>\d{1,4}))?"
NAME = re.compile(
    rf"(?:(?P<method>.+)-)?w(?P<w>\d{{1,4}})(?:g(?P<group>\d{{1,6}}))?"
    rf"a(?P<a>\d{{1,4}}(?:\.\d{{1,4}})?){_CACHE}{_OUTER}"
)
WEIGHTS_ONLY = re.compile(rf"(?P<method>higgs|balanced)-(?P<bits>\d{{1,2}}(?:\.\d{{1,4}})?){_OUTER}")
LETTERS = ("w", "g", "a", "kv", "k", "v", "e", "h")
DEFAULT_METHOD, BINARY_METHOD = "paley", "bwa"
AS_PUBLISHED = ("quarot", "quarot-clipped", "rtn")  # methods that leave embedding and head unquantized unless asked
UNQUANTIZED = 16
# Bits of embedding and head; as many as the weights if those have more.
_OUTER_BITS = 6
FILES = (".yaml", ".yml", ".json")
# What people type, the most careful first; MEASURED tells what each costs on the model in assets/.
LISTED = {
    "w16a16kv4": "only the KV cache in 4 bits",
    "w4a16": "weights alone, by GPTQ on calibration text",
    "balanced-4": "weights alone, balanced on text that the model writes itself",
    "higgs-4": "weights alone, without data, quickly",
    "higgs-3": "the same in 3 bits",
    "w4a4kv4": "weights, inputs and cache",
    "w3a3kv3": "the same in 3 bits",
    "w1a4": "weights of a sign and a grouping bit",
}
MEASURED = "measured.json"


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe as it is, a file by its suffix, any other text as a preset's name."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or recipe.lower().endswith(FILES):
        return load_recipe(recipe)
    return preset(recipe)


def under_budget(recipe: Recipe | None = None, **limits: float) -> Recipe:
    """recipe with these limits in its budget (weights, size, kv, inputs, read: see `Budget`).

    Without a recipe it starts from `balanced`, which needs no data; the budget replaces its grids. It quantizes the
    cache if kv is limited, and weights unless kv is the only limit.
    """
    if recipe is None:
        weights, cache = (16, 4) if set(limits) == {"kv"} else (4, 4 if "kv" in limits else 16)
        recipe = preset(f"balanced-w{weights}a16kv{cache}")
    kept = {} if recipe.budget is None else recipe.budget.model_dump(exclude_none=True)
    data = kept | limits
    try:
        budget = Budget.model_validate(data)
    except ValidationError as error:
        wrong = problems(error, data, Budget).items()
        parts = [part for key, problem in wrong for part in ("; ", Setting(f"budget.{key}"), f": {problem}")]
        raise PaleyError(*parts[1:]) from None
    return recipe.model_copy(update={"budget": budget})


def _files() -> dict[str, Traversable]:
    folder = resources.files("paley").joinpath("presets")
    return {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}


def preset_methods() -> list[str]:
    """The methods that a preset's name may begin with."""
    return sorted(_files())


def measured() -> dict[str, Any]:
    """What `studies/presets.py` measured of LISTED on the model in assets/: {"presets": {name: figures}, ...}."""
    return json.loads(resources.files("paley").joinpath("presets", MEASURED).read_text(encoding="utf-8"))


def examples() -> list[str]:
    """A preset of each method."""
    return ["w1a4" if method == BINARY_METHOD else f"{method}-w4a4kv4" for method in preset_methods()]


def preset(name: str) -> Recipe:
    """A name such as 'w3a3kv3', 'w4g64a16', 'quarot-w4a4kv4', 'w1a4', 'higgs-3.25' or 'gguf-q4_0' -> recipe.

    16 bits are unquantized. A fraction of input bits, as in 'w4a4.5kv4', is their mean under a budget.
    """
    if (exact := name.strip().lower()) in TARGETS:
        return validate(Recipe, target(exact), f"preset {name!r}")
    if (short := WEIGHTS_ONLY.fullmatch(name.strip().lower())) is not None:
        outer = "".join(letter + short[letter] for letter in "eh" if short[letter])
        return _weights_only(short["method"], float(short["bits"]), outer, name)
    match = NAME.fullmatch(name.strip().lower())
    if match is None:
        raise PaleyError(
            f"preset {name!r}: there is none of this name; did you mean {_meant(name)!r}? Names are {PATTERN}, see "
            "`paley presets`"
        )
    binary = match["w"] == "1"
    method = match["method"] or (BINARY_METHOD if binary else DEFAULT_METHOD)
    files = _files()
    if method not in files:
        near = nearest_name(method, files) or f"; did you mean {_meant(name)!r}?"
        raise PaleyError(f"preset {name!r}: unknown method {method!r}{near} Methods are {', '.join(sorted(files))}")
    inputs = float(match["a"])  # a fraction is a budget
    bits = {"w": int(match["w"]), "a": math.ceil(inputs)}
    bits |= {part: int(match[part] or match["kv"] or UNQUANTIZED) for part in ("k", "v")}
    outer = UNQUANTIZED if method in AS_PUBLISHED or bits["w"] == UNQUANTIZED else max(_OUTER_BITS, bits["w"])
    bits |= {part: int(match[part] or outer) for part in ("e", "h")}
    if binary != (method == BINARY_METHOD):
        raise PaleyError(f"preset {name!r}: W1 and the method {BINARY_METHOD} need each other, as in w1a4")
    if binary and inputs != bits["a"]:
        raise PaleyError(f"preset {name!r}: W1 takes whole bits of inputs, as in w1a{bits['a']}")
    if binary and not (match["kv"] or match["k"]) and bits["a"] != UNQUANTIZED:
        bits |= {"k": 4, "v": 4}
    for part, value in (bits | {"a": inputs}).items():
        if binary and part == "w":
            continue
        if not (MIN_BITS <= value <= MAX_BITS or value == UNQUANTIZED):
            letters = "KV" if part in ("k", "v") and match["kv"] else part.upper()
            raise PaleyError(
                f"preset {name!r}: {letters}{value:g} has no grid; bits are {MIN_BITS} to {MAX_BITS}, "
                f"or {UNQUANTIZED} for unquantized"
            )
    data = yaml_value(files[method].read_text(encoding="utf-8"), f"preset {method}")
    recipe = validate(Recipe, _fill(data, bits, match["group"], name), f"preset {name!r}")
    return recipe if inputs == bits["a"] else under_budget(recipe, inputs=inputs)


def _fill(data: dict[str, Any], bits: dict[str, int], group: str | None, name: str) -> dict[str, Any]:
    """A method's data with its bits filled in, and null for tensors that stay unquantized."""
    places = {"weights": "w", "embedding": "e", "head": "h", "inputs": "a", "keys": "k", "values": "v"}
    for key, part in places.items():
        if bits[part] == UNQUANTIZED:
            data[key] = None
        else:
            pairs, vectors = _best_vectors(bits[part], 2), _best_vectors(bits[part], 4)
            best = f"trellis{bits[part]}" if f"trellis{bits[part]}" in trellis.names() else vectors
            # The head is the largest matrix that a token reads, and a table of more than 2^8 pairs is slow to look up.
            outer = pairs if bits[part] <= 4 else f"p1n{2 ** bits[part]}"
            if data["weights"] is not None and data["weights"]["grid"].startswith("trellis"):  # the first to be filled
                outer = best
            by_rate = {"pairs": pairs, "vectors": vectors, "best": best, "outer": outer}
            data[key]["grid"] = data[key]["grid"].format(**bits, **by_rate)
    if group is not None:
        if data["weights"] is None:
            raise PaleyError(f"preset {name!r}: G{group} is the group size of weights that W16 leaves unquantized")
        for part in (data["weights"], data["inputs"]):
            if part is data["weights"] or (part is not None and "group_size" in part):
                part["group_size"] = int(group)
        data["fit_groups"] = False  # an explicit number is used or refused
    if bits["a"] == bits["k"] == bits["v"] == UNQUANTIZED:
        data["search"]["method"] = "none"  # no activation site has a clip ratio to search
    return data


def _best_vectors(bits: int, most: int) -> str:
    """The grid of these bits with the most dimensions that fit in a table; odd dimensions fill rows badly."""
    p = max(p for p in (1, 2, 4) if p == 1 or (p <= most and 2 ** (bits * p) <= MAX_POINTS))
    return f"p{p}n{2 ** (bits * p)}"


def _meant(name: str) -> str:
    """The preset closest to a name that is none: its method, and its numbers in the order of the grammar."""
    text = name.strip().lower()
    if alike := [target for target in TARGETS if target.partition("-")[0] == text.partition("-")[0]]:
        return difflib.get_close_matches(text, alike, n=1, cutoff=0.0)[0]
    if f"gguf-{text}" in TARGETS:
        return f"gguf-{text}"
    method = max((known for known in preset_methods() if text.startswith(known)), key=len, default="")
    bits: dict[str, str] = {}
    for letter, number in re.findall(r"([a-z]*)([1-9]\d*)", text.removeprefix(method)):
        if letter not in LETTERS or letter in bits:
            letter = "w" if "w" not in bits else "kv" if "k" in letter or "a" in bits else "a"
        bits.setdefault(letter, number)
    if "kv" in bits or ("k" in bits) != ("v" in bits):  # one of the two alone is no name
        given = [bits.pop(letter, "") for letter in ("kv", "k", "v")]
        bits["kv"] = next(filter(None, given))
    bits = {"w": "4", "a": str(UNQUANTIZED)} | bits
    best = "".join(letter + bits[letter] for letter in LETTERS if letter in bits)
    best = f"{method}-{best}" if method else best
    try:
        preset(best)
    except PaleyError:  # bits without a grid, a method without these bits
        return "w4a16"
    return best


def _weights_only(method: str, bits: float, outer: str, name: str) -> Recipe:
    """Weights alone, without data, on the grid of least error within these bits: of two dimensions for HIGGS proper,
    with a diagonal also of trellis codes.
    """  # fmt: skip
    candidates = [grids.as_fixed(grids.load(known)) for known in tables.names()]
    candidates = [grid for grid in candidates if grid.p == 2]
    if method == "balanced":
        candidates += [grid for grid in map(trellis.load, trellis.names()) if grid.bits >= MIN_BITS]
    rates = {grid: stored_bits(grid) for grid in candidates}
    fitting = [grid for grid, rate in rates.items() if rate <= bits]
    if not fitting or bits > max(rates.values()):
        low, high = min(rates.values()), max(rates.values())
        reach = f"{low:.3g} to {high:.3g} bits"
        raise PaleyError(
            f"preset {name!r}: HIGGS in two dimensions reaches {reach}",
            remedy=(Setting("weights.grid"), " takes any other grid"),
        )
    recipe = preset(f"{method}-w{min(8, max(2, round(bits)))}a16{outer}")
    assert recipe.weights is not None
    best = min(fitting, key=lambda grid: grid.mse)
    return recipe.model_copy(update={"weights": replace(recipe.weights, grid=best)})
