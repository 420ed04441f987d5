"""Plans: what was decided for one model, as a small JSON file that a person can read, diff and edit.

The result of a search is a plan; `quantize` executes it. The same plan on the same checkpoint gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat

from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme, LinearScheme, Rotation
from paley.recipe.documents import AnyFloat, Document
from paley.recipe.models import Recipe
from paley.recipe.saving import in_natural_order
from paley.recipe.sources import located, shared

__all__ = ["VERSION", "Plan", "Trial"]

VERSION = 2  # 1 had no embedding and head, and named rotations by the layers that they rotate
LinearSchemes = Annotated[dict[str, LinearScheme], AfterValidator(in_natural_order)]
AttentionSchemes = Annotated[dict[str, AttentionScheme], AfterValidator(in_natural_order)]


class Trial(BaseModel):
    """One evaluation of a search: the objective for `clip_ratio` at the site `slot`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot: str
    clip_ratio: FiniteFloat
    objective: AnyFloat


class Plan(Document):
    """What to do to each weight and each attention of the model with this fingerprint.

    Schemes are kept in the natural order of their names.
    """

    what: ClassVar[str] = "plan"

    version: Literal[2] = VERSION
    fingerprint: str
    model_type: str
    recipe: Recipe
    rotation: Rotation | None = None
    linears: LinearSchemes
    attentions: AttentionSchemes
    predicted_loss: AnyFloat | None = None
    bits_per_weight: FiniteFloat | None = None
    trace: tuple[Trial, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """As of documents; texts that the file names by their paths from it are found from here."""
        plan = super().load(path)
        return plan.model_copy(update={"recipe": located(plan.recipe, Path(path).parent)})

    def shared(self, folder: Path) -> Self:
        """The plan as a file in `folder` may have it, with no path that tells about this machine."""
        return self.model_copy(update={"recipe": shared(self.recipe, folder)})

    def check_fingerprint(self, actual: str) -> Self:
        """Returns self; raises if the plan was made for a model with another fingerprint than `actual`."""
        if actual != self.fingerprint:
            raise PaleyError(
                f"this plan was made for a {self.model_type} model with fingerprint {self.fingerprint}, "
                f"the model here has {actual}; use that model, or make a new plan for this one"
            )
        return self
