"""How a folder was made: the command that makes it again, its recipe, the versions."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field

from paley.pipeline.inspect import Inspection
from paley.plan import Plan

__all__ = ["Making", "making"]

_NAMES = {"paley": "Paley", "torch": "PyTorch", "transformers": "transformers"}
_PARTS = ("calibration", "search", "test", "budget")


@dataclass(frozen=True)
class Making:
    """command: makes the folder again, and `words` say when; empty without a plan. versions: what is known of them.
    recipe: as JSON.
    """

    command: str = ""
    words: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    recipe: str = ""


def making(inspection: Inspection, plan: Plan | None) -> Making:
    """What the folder's plan and results say."""
    results, name = inspection.results, inspection.folder.resolve().name
    found = {} if results is None else results.made_with
    versions = {_NAMES.get(key, key): version for key, version in found.items()}
    if plan is None:
        return Making(versions=versions)
    command = ["paley", "quantize", "ORIGINAL", "--plan", f"{name}/plan.json", "--output", "NEW"]
    words = (
        f"Built from plan.json: with ORIGINAL, the model of fingerprint {plan.fingerprint[:16]}, the same versions and "
        "the same kind of machine, it gives the same bytes. The command that was typed is not kept: its paths would "
        "tell about the machine."
    )
    sources = [getattr(getattr(plan.recipe, part), "source", None) or "" for part in _PARTS]
    if hidden := sorted({source for source in sources if source.startswith("…/")}):
        words += f" plan.json does not tell where these texts are, so put their paths into it: {', '.join(hidden)}."
    if results is not None and results.kept is not None:
        command += ["--from", "BASE"]
        words += f" BASE is the folder with digest {results.kept.digest[:16]}, whose weights were kept."
    recipe = json.dumps(plan.recipe.model_dump(mode="json", exclude_none=True), indent=2)
    return Making(shlex.join(command), words, versions, recipe)
