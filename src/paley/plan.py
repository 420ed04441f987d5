"""Plans: what was decided for one model, as a small JSON file that a person can read, diff and edit.

Searches write plans and nothing else; quantizing executes one. The same plan on the same checkpoint gives the
same bytes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FiniteFloat, PlainSerializer

from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme, LinearScheme, Rotation
from paley.recipe.documents import Document
from paley.recipe.models import Recipe
from paley.recipe.saving import in_natural_order

__all__ = ["VERSION", "Plan", "Trial"]

VERSION = 2  # 1 had no embedding and head, and told rotations apart by the layers that they turn
# JSON has no word for these numbers, and a search may well meet an infinite perplexity.
NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _from_name(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _to_name(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


Loss = Annotated[float, BeforeValidator(_from_name), PlainSerializer(_to_name, when_used="json")]
LinearSchemes = Annotated[dict[str, LinearScheme], AfterValidator(in_natural_order)]
AttentionSchemes = Annotated[dict[str, AttentionScheme], AfterValidator(in_natural_order)]


class Trial(BaseModel):
    """One evaluation of a search: the objective that `clip_ratio` at `slot` gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot: str
    clip_ratio: FiniteFloat
    objective: Loss


class Plan(Document):
    """What to do to each weight and each attention of the model whose fingerprint this is.

    Schemes are held in the natural order of their names, whatever order they come in.
    """

    what: ClassVar[str] = "plan"

    version: Literal[2] = VERSION
    fingerprint: str
    model_type: str
    recipe: Recipe
    rotation: Rotation | None = None
    linears: LinearSchemes
    attentions: AttentionSchemes
    predicted_loss: Loss | None = None
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
