"""What `quantize` and `plan` are asked for: their options -> a recipe, or a plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from paley.cli.process import naming
from paley.core import grids
from paley.core.errors import PaleyError
from paley.format.checkpoint import read_tensors
from paley.plan import Plan
from paley.recipe import Recipe, apply_settings, examples, load_recipe, preset
from paley.sensitivity import Sensitivity

__all__ = ["Wish", "numbers", "slopes_of"]

_OPTIONS = {"weights": "--target-bpw", "size": "--target-size", "kv": "--kv-bpw"}  # of a budget's keys
# What a budget alone stands for: HIGGS, whose grids it then chooses; one for the cache needs schemes there.
BUDGETED, BUDGETED_BOTH, BUDGETED_CACHE = "higgs-4", "higgs-w4a16kv4", "higgs-w16a16kv4"


@dataclass(frozen=True)
class Wish:
    """The options of `quantize` and `plan` that say what is wanted."""

    preset: str | None = None
    recipe: Path | None = None
    plan: Path | None = None
    settings: tuple[str, ...] = ()
    calibration: str | None = None
    test: str | None = None
    expand: str | None = None
    seed: int | None = None
    grid: str | None = None
    no_score: bool = False
    target_bpw: float | None = None
    target_size: str | None = None
    kv_bpw: float | None = None

    def chosen(self) -> Recipe | Plan:
        """The recipe with all settings put in, or the plan; raises unless one of the three is named."""
        given = {"--preset": self.preset, "--recipe": self.recipe, "--plan": self.plan}
        if self.no_score and self.test is not None:
            raise PaleyError("--no-score and --test exclude each other: give one of them")
        named = [option for option, value in given.items() if value is not None]
        budget = self._budget()
        if not named and not budget:
            methods = ", ".join(examples())
            raise PaleyError(
                "say what to do: --preset NAME (w4a4kv4, w3a3kv3, w4a16, ...; by another method: "
                f"{methods}; see `paley presets`), --recipe FILE or --plan FILE"
            )
        if len(named) > 1:
            raise PaleyError(f"{' and '.join(named)} exclude each other: give one of them")
        settings = self._all_settings()
        if self.plan is not None:
            if settings or self.grid or budget:
                other = settings[0] if settings else "--grid" if self.grid else _OPTIONS[next(iter(budget))]
                raise PaleyError(
                    f"--plan is executed as it stands, but {other!r} would change it; edit the file, "
                    "or make a new one with `paley plan`"
                )
            return Plan.load(self.plan)
        alone = BUDGETED if "kv" not in budget else BUDGETED_BOTH if len(budget) > 1 else BUDGETED_CACHE
        recipe = load_recipe(self.recipe) if self.recipe is not None else preset(self.preset or alone)
        if budget:
            kept = {} if recipe.budget is None else recipe.budget.model_dump(exclude_none=True, mode="json")
            settings = [f"budget={json.dumps(kept | budget)}", *settings]
        with naming(self.options()):
            recipe = apply_settings(recipe, settings)
        return recipe if self.grid is None else _with_grid(recipe, self.grid)

    def options(self) -> dict[str, str]:
        """Setting -> the option that was given for it."""
        return {f"budget.{key}": _OPTIONS[key] for key in self._budget()}

    def _budget(self) -> dict[str, float]:
        given = {
            "weights": self.target_bpw,
            "size": None if self.target_size is None else _bytes(self.target_size),
            "kv": self.kv_bpw,
        }
        found = {key: value for key, value in given.items() if value is not None}
        for key, value in found.items():
            if not math.isfinite(value):
                raise PaleyError(f"{_OPTIONS[key]} {value}: must be a finite number")
        return found

    def _all_settings(self) -> list[str]:
        """--set, then the options that are shorter names of settings; text quoted, as values are YAML."""
        quoted = {"calibration.source": self.calibration, "test.source": self.test}
        plain = {"expand": self.expand, "seed": self.seed}
        found = [f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in quoted.items() if v is not None]
        unscored = ["test=null"] if self.no_score else []
        return [*self.settings, *found, *(f"{key}={v}" for key, v in plain.items() if v is not None), *unscored]


def numbers(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PaleyError(f"--target-bpw {text}: expected numbers with commas between them, such as 2.5,3,4") from None


def slopes_of(file: Path | None, chosen: Recipe | Plan) -> Sensitivity | None:
    if file is None:
        return None
    if isinstance(chosen, Plan) or chosen.budget is None:
        raise PaleyError("--sensitivity serves a budget: give --target-bpw, --target-size, --kv-bpw, or a recipe's own")
    return Sensitivity.load(file)


def _bytes(text: str) -> int:
    """'4GB' -> 4,000,000,000; '4GiB' -> 2^32; a plain number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kKMGT]?)(i?)B?", text.strip())
    if match is None:
        raise PaleyError(f"--target-size {text}: expected a size such as 4GB, 3.5GiB or 500MB")
    power = " kMGT".index(match[2].replace("K", "k") or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _with_grid(recipe: Recipe, name: str) -> Recipe:
    """recipe with its weights on another grid, a packaged one or a file's; vectors are scaled by their rms."""
    if recipe.weights is None:
        raise PaleyError(f"--grid {name}: this recipe leaves weights unquantized")
    if name.endswith(".safetensors"):
        tensors = read_tensors(name)
        if set(tensors) != {"points"}:
            raise PaleyError(f"{name}: a grid's file holds one tensor, points [n, p], got {', '.join(sorted(tensors))}")
        grid = grids.custom(tensors["points"], name)
        grids.check_scaled(grid, name)
    else:
        grid = grids.load(name)
    weights = recipe.weights.on_grid(grid.name)
    return recipe.model_copy(update={"weights": weights})
