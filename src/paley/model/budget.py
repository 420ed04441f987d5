"""Grids for sites under a budget: measured slopes times the error of each grid, minimised exactly.

The linearity theorem (arXiv:2411.17525) makes the loss a sum over sites, alpha * t^2, and the choice a knapsack:
`core.allocation` solves it. Its items are `model.choices`; its resources are the limits of the recipe's budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paley.core.allocation import Allocation, Choice, allocate
from paley.core.errors import Call, PaleyError, Setting
from paley.core.schemes import ActivationScheme, Schemes
from paley.methods.nearest import gaussian_error
from paley.methods.sensitivity import MAX_T
from paley.model.activation_errors import Place
from paley.model.choices import Errors, Item, gaussian_errors, items, kept
from paley.model.problem import Problem
from paley.recipe.models import Budget
from paley.sensitivity import Sensitivity

__all__ = ["activation_options", "check_budget", "decide_grids", "decides_weights", "fed_back", "range_note"]

_FEW_BITS = 3  # below, losses were measured to grow faster than the slopes say (docs/methods.md)


@dataclass(frozen=True)
class Resource:
    """A limit of a budget, `key` its setting. It counts the bits of some kinds of items.

    average: the limit is in bits for each value, else in bytes, of which `beside` are taken already. per_token: an item
    counts as often as a token reads it. lacking: what a recipe without such items lacks, a preset that has it, another
    way to it.
    """

    key: str
    name: str
    kinds: tuple[str, ...]
    average: bool = True
    per_token: bool = False
    lacking: tuple[str, str, str] = ("", "", "")

    def cost(self, item: Item, bits: int, context: int) -> int:
        """What `bits` of an item take of it."""
        if item.kind not in self.kinds:
            return 0
        if not self.per_token:
            return bits
        return bits * (item.reads if item.kind == "weight" else item.site.tokens(context))

    def amount(self, problem: Problem, found: Sequence[Item], limit: float) -> int:
        """How many bits there are of it."""
        if self.average:
            return int(limit * sum(item.values for item in found if item.kind in self.kinds))
        return int(8 * (limit - self.beside(problem, found)))

    def beside(self, problem: Problem, found: Sequence[Item]) -> int:
        """Bytes that it counts of what the budget does not decide."""
        return (_other_reads if self.per_token else _other_bytes)(problem, found)


_RESOURCES = (
    Resource("weights", "bits of weights", ("weight",), lacking=("weights", "higgs-4", "")),
    Resource(
        "kv", "bits of kv", ("keys", "values"),
        lacking=("keys or values", "higgs-w4a16kv4", ", or set keys and values"),
    ),
    Resource("inputs", "bits of inputs", ("input",), lacking=("inputs", "higgs-w4a4", ", or set inputs")),
    Resource("size", "bits on disk", ("weight",), average=False),
    Resource("read", "bits read a token", ("weight", "keys", "values"), average=False, per_token=True),
)  # fmt: skip


def _limits(budget: Budget) -> dict[Resource, float]:
    """The resources that the budget limits, and how far."""
    asked = {resource: getattr(budget, resource.key) for resource in _RESOURCES}
    return {resource: limit for resource, limit in asked.items() if limit is not None}


def decide_grids(
    problem: Problem, sensitivity: Sensitivity, errors: Errors | None = None
) -> tuple[Schemes, Allocation]:
    """The schemes with the grids of least predicted loss that the problem's budget can pay for.

    errors: measured ones of `activation_options`; those of Gaussian values unless given. Sites that an override of the
    recipe set are left as they are, and paid for.
    Raises PaleyError for slopes that are missing or were measured otherwise, and for budgets out of reach.
    """
    budget = problem.budget
    assert budget is not None
    found, limits = _budgeted(problem, errors or gaussian_errors), _limits(budget)
    _check_reach(problem, found)
    _check_slopes(problem, found, sensitivity)
    amounts = {resource: resource.amount(problem, found, limit) for resource, limit in limits.items()}
    choices = {}
    for item in _within_linear_range(found, amounts, budget.context):
        slope = sensitivity.slots.get(item.site.name)  # None for what no budget is about, and nobody measured
        choices[item.name] = [
            Choice(
                name,
                slope.loss(item.errors[name]) if slope is not None else 0.0,
                tuple(resource.cost(item, bits, budget.context) for resource in amounts),
            )
            for name, bits in item.bits.items()
        ]
    best = allocate(choices, list(amounts.values()), resources=[resource.name for resource in amounts])
    return _with_choices(problem, found, best), best


def check_budget(problem: Problem, sensitivity: Sensitivity | None = None) -> None:
    """Raises as `decide_grids` would, before anybody measures slopes, or errors, for it."""
    found = _budgeted(problem, _unmeasured)
    _check_reach(problem, found)
    if sensitivity is not None:
        _check_slopes(problem, found, sensitivity)


def activation_options(problem: Problem) -> dict[Place, tuple[ActivationScheme, ...]]:
    """Where the budget decides a grid of keys, values or inputs -> the schemes whose errors it is decided by."""
    return {item.places[0]: item.options for item in _budgeted(problem, _unmeasured) if item.options}


def decides_weights(budget: Budget) -> bool:
    return any("weight" in resource.kinds for resource in _limits(budget))


def fed_back(problem: Problem) -> frozenset[str]:
    """The weights by GPTQ, if the budget decides any weights: its prediction needs the text that GPTQ sees."""
    if problem.budget is None or not decides_weights(problem.budget):
        return frozenset()
    schemes = problem.schemes.linears.items()
    return frozenset(name for name, s in schemes if s.weight is not None and s.weight.method == "gptq")


def range_note(problem: Problem) -> str:
    """Why the loss may exceed what was predicted for weights decided so; empty if nothing speaks against it."""
    assert problem.budget is not None
    if not decides_weights(problem.budget):
        return ""
    bits = values = beyond = 0
    for site, scheme in problem.weights():
        if site.kind == "linear":  # many words in many bits say nothing of them
            bits += 8 * problem.stored_bytes(site)
            values += site.numel
        if scheme.weight is not None:
            beyond += gaussian_error(scheme.weight, scheme.stored_width(problem.shape(site)[1])) > MAX_T**2
    if bits < _FEW_BITS * values:
        return f"budget: below {_FEW_BITS} bits losses grow faster than predicted"
    if beyond:
        return (
            "budget: some weights are rounded beyond the range of the slopes, where losses grow faster than predicted"
        )
    return ""


def _budgeted(problem: Problem, errors: Errors) -> list[Item]:
    """The items that one of the budget's limits is about."""
    assert problem.budget is not None
    kinds = {kind for resource in _limits(problem.budget) for kind in resource.kinds}
    return list(items(problem, errors, kinds))


def _within_linear_range(found: list[Item], amounts: dict[Resource, int], context: int) -> list[Item]:
    """The items without choices whose t^2 is beyond the range of the slopes, as far as the budget can pay for that.

    Slopes say nothing of them: with such choices an optimum at 3 bits did worse than one grid for all.
    """
    thresholds = sorted({MAX_T**2, *(e for item in found for e in item.errors.values() if e > MAX_T**2)})
    for threshold in thresholds:
        left = [item.up_to(threshold) for item in found]
        if all(
            sum(resource.cost(item, min(item.bits.values()), context) for item in left) <= amount
            for resource, amount in amounts.items()
        ):
            return left
    return found


def _check_reach(problem: Problem, found: list[Item]) -> None:
    """Raises if a limit is asked for that no choice meets, and says which there are."""
    budget = problem.budget
    assert budget is not None
    for resource, limit in _limits(budget).items():
        of_kind = [item for item in found if item.kind in resource.kinds]
        low, high = (
            sum(resource.cost(item, end(item.bits.values()), budget.context) for item in of_kind) for end in (min, max)
        )
        if resource.average:
            if not of_kind:
                what, preset, other = resource.lacking
                raise PaleyError(
                    Setting(f"budget.{resource.key}"),
                    f": this recipe quantizes no {what}",
                    remedy=("take one that does, such as ", Setting("preset", preset), other),
                )
            values = sum(item.values for item in of_kind)
            low, high = low / values, high / values
            if not low <= limit <= max(high, 16):
                raise PaleyError(
                    Setting(f"budget.{resource.key}"),
                    f": {limit:g} bits are out of reach",
                    remedy=f"{low:.4g} to {high:.4g} can be had here",
                )
            continue
        low, high = (resource.beside(problem, found) + bits / 8 for bits in (low, high))
        if limit < low:
            raise PaleyError(
                Setting(f"budget.{resource.key}"),
                f": {limit:,} bytes are out of reach",
                remedy=f"{low:,.0f} to {high:,.0f} can be had here",
            )


def _with_choices(problem: Problem, found: list[Item], best: Allocation) -> Schemes:
    linears, attentions = dict(problem.schemes.linears), dict(problem.schemes.attentions)
    for item in found:
        scheme: Any = item.schemes[best.choices[item.name].name]
        for module, place in item.places:
            if module in attentions:
                attentions[module] = replace(attentions[module], **{place: scheme})
                continue
            linear = linears[module]
            linears[module] = kept(linear) if scheme is None else replace(linear, **{place: scheme})
    return Schemes(linears, attentions)


def _check_slopes(problem: Problem, found: list[Item], sensitivity: Sensitivity) -> None:
    if sensitivity.folded != problem.folded:
        have, need = ("with", "without") if sensitivity.folded else ("without", "with")
        again = Call("measure_sensitivity", (Setting("fold", problem.folded),))
        raise PaleyError(
            f"the sensitivities were measured {have} the norms' gains in the weights, but this recipe quantizes "
            f"weights {need} them",
            remedy=("measure them again with ", again),
        )
    sensitivity.check_slots({i.site.name: (i.kind, i.values) for i in found if len(i.bits) > 1})


def _unmeasured(place: Place, scheme: ActivationScheme, width: int) -> float:
    return 0.0


def _other_bytes(problem: Problem, found: Sequence[Item]) -> int:
    """Bytes on disk of everything but the weights that the budget decides."""
    decided = {name for item in found if item.kind == "weight" for name in problem.sites.held_as(item.site)}
    parameters = problem.source.skeleton.named_parameters()
    values = sum(p.numel() for name, p in parameters if name not in decided)
    means = sum(scheme.mean_keys for scheme in problem.schemes.attentions.values())
    keys = max((site.numel for site in problem.sites.of("keys")), default=0)
    return values * problem.dtype.itemsize + means * 2 * keys


def _other_reads(problem: Problem, found: Sequence[Item]) -> int:
    """Bytes read for every token beside the items: kept weights and head, a cache of 16 bits a value.

    Of the embedding that is a row, of the norms next to nothing.
    """
    decided = {item.site.stored_as for item in found if item.kind == "weight"}
    kept_values = sum(s.numel for s in problem.sites.of("linear", "head") if s.stored_as not in decided)
    assert problem.budget is not None
    cache = 0
    for site in problem.sites.of("keys", "values"):
        if getattr(problem.schemes.attentions[site.module], site.kind) is None:
            cache += 2 * site.tokens(problem.budget.context) * site.numel
    return kept_values * problem.dtype.itemsize + cache
