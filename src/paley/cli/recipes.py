"""What `quantize` and `plan` are asked for: their options -> a recipe, or a plan."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paley.core import grids
from paley.core.errors import PaleyError
from paley.format.checkpoint import read_tensors
from paley.plan import Plan
from paley.recipe import Recipe, Tune, apply_settings, examples, load_recipe, preset, under_budget
from paley.recipe.loading import setting_text
from paley.sensitivity import Sensitivity

__all__ = ["Request", "numbers", "slopes_of"]

_OPTIONS = {"weights": "--target-bpw", "size": "--target-size", "kv": "--kv-bpw"}  # of a budget's keys


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `quantize` and `plan` that say what to do."""

    preset: str | None
    recipe: Path | None
    plan: Path | None = None
    base: Path | None = None
    settings: list[str] | None
    calibration: str | None
    test: str | None
    expand: str | None
    seed: int | None
    grid: str | None
    no_score: bool = False
    tune: bool = False
    target_bpw: float | None
    target_size: str | None
    kv_bpw: float | None

    def resolve(self) -> Recipe | Plan:
        """The recipe with all settings put in, or the plan; raises unless one of them is named."""
        if self.no_score and self.test is not None:
            raise PaleyError("--no-score and --test exclude each other: give one of them")
        given = {"--preset": self.preset, "--recipe": self.recipe, "--plan": self.plan}
        named = [option for option, value in given.items() if value is not None]
        limits = self._limits()
        if not named and not limits and self.base is None:
            raise PaleyError(
                "say what to do: --preset NAME (w4a4kv4, w3a3kv3, w4a16, ...; by another method: "
                f"{', '.join(examples())}; see `paley presets`), --recipe FILE or --plan FILE"
            )
        if len(named) > 1:
            raise PaleyError(f"{' and '.join(named)} exclude each other: give one of them")
        settings = [*(self.settings or ()), *self._values()]
        if self.plan is not None:
            return self._whole_plan(settings, limits)
        recipe = None
        if self.recipe is not None:
            recipe = load_recipe(self.recipe)
        elif self.preset is not None:
            recipe = preset(self.preset)
        elif self.base is not None:
            recipe = self._of_base()
        if limits or recipe is None:
            recipe = under_budget(recipe, **limits)
        if self.tune and recipe.tune is None:
            recipe = recipe.model_copy(update={"tune": Tune()})
        recipe = apply_settings(recipe, settings)
        return recipe if self.grid is None else _with_grid(recipe, self.grid)

    def _of_base(self) -> Recipe:
        """The recipe of the earlier folder; raises where that names a text of the Hub, and the user does not."""
        assert self.base is not None
        recipe = Plan.load(self.base / "plan.json").recipe
        for name, given in (("calibration", self.calibration), ("test", self.test or self.no_score or None)):
            part = getattr(recipe, name)
            if given is None and part is not None and (part.source or "").startswith("hub:"):
                raise PaleyError(
                    f"{self.base / 'plan.json'}: its {name} text is {part.source}, which is fetched only if you name "
                    f"it: --{name} {part.source}"
                )
        return recipe

    def _whole_plan(self, settings: list[str | tuple[str, Any]], limits: dict[str, float]) -> Plan:
        """The plan; raises if an option would change it."""
        assert self.plan is not None
        changes = [setting_text(setting) for setting in settings]
        changes += ["--tune"] if self.tune else []
        changes += ["--grid"] if self.grid else []
        changes += [_OPTIONS[key] for key in limits]
        if changes:
            raise PaleyError(
                f"--plan is executed as it stands, but {changes[0]!r} would change it; edit the file, or make a new "
                "one with `paley plan`"
            )
        return Plan.load(self.plan)

    def _limits(self) -> dict[str, float]:
        """What a budget is to limit."""
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

    def _values(self) -> list[tuple[str, Any]]:
        """The options that are shorter names of settings."""
        expand = int(self.expand) if self.expand and re.fullmatch(r"-?\d+", self.expand) else self.expand
        values = {
            "calibration.source": self.calibration, "test.source": self.test, "expand": expand, "seed": self.seed,
        }  # fmt: skip
        unscored = [("test", None)] if self.no_score else []
        return [*((key, value) for key, value in values.items() if value is not None), *unscored]


def numbers(text: str | None) -> list[float]:
    """The budgets of --target-bpw; none without it."""
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PaleyError(f"--target-bpw {text}: expected numbers with commas between them, such as 2.5,3,4") from None


def slopes_of(file: Path | None, chosen: Recipe | Plan) -> Sensitivity | None:
    """What --sensitivity names; raises if nothing needs it."""
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
        grid.check_scaled(name)
    else:
        grid = grids.load(name)
    weights = recipe.weights.on_grid(grid)
    return recipe.model_copy(update={"weights": weights})
