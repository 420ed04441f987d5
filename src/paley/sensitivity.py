"""Measured sensitivities of one model, as a JSON file with a line for each site.

With t^2 the relative squared error of each site, the loss grows by about sum alpha t^2 (arXiv:2411.17525), from about
3 bits up. The slopes alpha depend on the model and not on the quantizer, so one measurement serves every budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from paley.core.errors import Call, PaleyError, Setting, nearest_name
from paley.recipe.documents import Document
from paley.recipe.saving import in_natural_order

__all__ = ["VERSION", "MeasuredSlot", "MeasuredText", "Sensitivity"]

VERSION = 2  # 1 had noise of one size in all rows of a weight

Positive = Annotated[FiniteFloat, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class MeasuredText(_Frozen):
    """The text on which the loss was measured; sha256: of its token ids."""

    source: str
    sha256: str
    tokens: Count


class MeasuredSlot(_Frozen):
    """numel: entries of a weight; for other kinds, values a token. levels: pairs of t^2 and the loss that it added;
    none where alpha is of gradients, the slope of small noise.

    clamped: the measured slope was not positive; alpha is a small number instead.
    """

    kind: Literal["weight", "input", "keys", "values"]
    numel: Count
    alpha: Positive
    stderr: Annotated[FiniteFloat, Field(ge=0)]
    clamped: bool = False
    levels: tuple[tuple[Positive, FiniteFloat], ...]

    def loss(self, t2: float) -> float:
        """The loss that an error of t^2 adds: alpha t^2 for weights; other kinds interpolate between the levels.

        Beyond the last level it grows with alpha. Budgets use errors of keys far below the lowest level, and there
        softmax makes the slope up to four times the fitted one.
        """
        if self.kind == "weight" or self.clamped:
            return self.alpha * t2
        low = low_loss = 0.0
        for level, loss in self.levels:
            if loss <= low_loss:  # lost in noise
                continue
            if t2 <= level:
                return low_loss + (loss - low_loss) * (t2 - low) / (level - low)
            low, low_loss = level, loss
        return low_loss + self.alpha * (t2 - low)

    def scaled(self, factor: float) -> MeasuredSlot:
        """The slot with all losses, and the slope, multiplied by a positive number."""
        if factor == 1.0:
            return self
        levels = tuple((t2, factor * loss) for t2, loss in self.levels)
        return self.model_copy(update={"alpha": factor * self.alpha, "stderr": factor * self.stderr, "levels": levels})


class Sensitivity(Document):
    """How fast `metric` grows with the relative squared error of each site of the model with this fingerprint.

    metric "kl": nats a token, baseline 0; "perplexity": baseline is the model's own. folded: measured for recipes that
    fold rotations, with the norms' gains in the weights, and noise of one size for rows that rotations mix. `slots` are
    the sites, in the natural order of their names.
    """

    what: ClassVar[str] = "sensitivity file"

    version: Literal[2] = VERSION
    fingerprint: str
    model_type: str
    metric: Literal["kl", "perplexity"]
    text: MeasuredText
    folded: bool
    seed: int
    baseline: FiniteFloat
    slots: Annotated[dict[str, MeasuredSlot], Field(min_length=1), AfterValidator(in_natural_order)]

    def alphas(self, kind: str = "weight") -> dict[str, float]:
        """Name -> slope of each site of a kind."""
        return {name: slot.alpha for name, slot in self.slots.items() if slot.kind == kind}

    def check_fingerprint(self, actual: str) -> Self:
        """Returns self; raises if the slopes were measured on a model with another fingerprint than `actual`."""
        if actual != self.fingerprint:
            raise PaleyError(
                f"these sensitivities are of a {self.model_type} model with fingerprint {self.fingerprint}, "
                f"the model here has {actual}",
                remedy=("use that model, or measure this one with ", Call("measure_sensitivity")),
            )
        return self

    def check_slots(self, wanted: Mapping[str, tuple[str, int]]) -> Self:
        """Returns self; wanted: name -> (kind, numel). Raises if a site is missing, or of another kind or size."""
        for name, (kind, numel) in wanted.items():
            slot = self.slots.get(name)
            kinds = () if kind == "weight" else (Setting("kinds", ("weight", kind)),)
            again = ("measure it with ", Call("measure_sensitivity", kinds))
            if slot is None:
                hint = nearest_name(name, self.alphas(kind))
                raise PaleyError(f"{name} has no slope{hint}", where="sensitivity", remedy=again)
            if (slot.kind, slot.numel) != (kind, numel):
                raise PaleyError(
                    f"{name} was measured as {slot.kind} of {slot.numel:,} values, in this model it is {kind} of "
                    f"{numel:,}; the file was changed",
                    where="sensitivity",
                    remedy=again,
                )
        return self
