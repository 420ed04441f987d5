"""Plans: what was decided for one model, as a small JSON file that a person can read, diff and edit.

Searches write plans and nothing else; quantizing executes one. The same plan on the same checkpoint gives the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from paley.core.errors import PaleyError
from paley.core.grids import know
from paley.core.schemes import AttentionSlot, LinearSlot
from paley.core.transforms import Transform
from paley.recipe.documents import AnyFloat, Document
from paley.recipe.models import Recipe
from paley.recipe.saving import in_natural_order

__all__ = ["VERSION", "Plan", "Rotation", "Trial"]

VERSION = 1
LinearSlots = Annotated[dict[str, LinearSlot], AfterValidator(in_natural_order)]
AttentionSlots = Annotated[dict[str, AttentionSlot], AfterValidator(in_natural_order)]


@dataclass(frozen=True)
class Rotation:
    """The model's transforms: residual (R1), head (R2 and R3, of head_dim), output (o_proj's input), mlp (R4).

    None: not applied. output and mlp act at run time, before the input is rounded.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    residual: Transform | None = None
    head: Transform | None = None
    output: Transform | None = None
    mlp: Transform | None = None


class Trial(BaseModel):
    """One evaluation of a search: the objective that `clip_ratio` in `slot` gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot: str
    clip_ratio: FiniteFloat
    objective: AnyFloat


class Plan(Document):
    """What to do to each linear layer and each attention of the model whose fingerprint this is.

    Slots are held in the natural order of their names, whatever order they come in. grids: the points of grids that
    came from a user's file.
    """

    what: ClassVar[str] = "plan"

    version: Literal[1] = VERSION
    fingerprint: str
    model_type: str
    grids: Annotated[dict[str, list[list[float]]], AfterValidator(know)] = Field(default_factory=dict)
    recipe: Recipe
    rotation: Rotation | None = None
    linears: LinearSlots
    attentions: AttentionSlots
    predicted_loss: AnyFloat | None = None
    bits_per_weight: FiniteFloat | None = None
    trace: tuple[Trial, ...] = ()

    def check_fingerprint(self, actual: str) -> Self:
        """-> self; raises where the plan was made for another model than that of fingerprint `actual`."""
        if actual != self.fingerprint:
            raise PaleyError(
                f"this plan was made for a {self.model_type} model with fingerprint {self.fingerprint}, "
                f"the model here has {actual}; use that model, or make a new plan for this one"
            )
        return self
