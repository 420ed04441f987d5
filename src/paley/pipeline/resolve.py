"""From a recipe, or a plan, to a problem: which scheme and which transform each site of the model gets. Done once."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from paley.arch import Architecture, Site, Sites, rope_follows_length
from paley.core.errors import PaleyError, nearest_name
from paley.core.schemes import LinearScheme, Schemes, WeightScheme
from paley.format.dtypes import FLOATS
from paley.format.header import TensorInfo
from paley.model.budget import check_budget
from paley.model.loading import Source
from paley.model.placing import summed_up
from paley.model.problem import Problem
from paley.model.rotation import Turning, decide_turning
from paley.pipeline.texts import calibrates
from paley.plan import Plan
from paley.recipe import Recipe

__all__ = ["resolve", "under_plan"]

# The ways out of a group_size that divides no layer's width, beside a divisor.
_FITTED = " (weights.group_size, inputs.group_size), or fit_groups=true"
_OVERRIDDEN = " in the override that gave it, which fit_groups leaves as it is"


def resolve(source: Source, recipe: Recipe) -> Problem:
    """What the recipe asks of each site of the model, checked against it; nothing is measured.

    Errors: PaleyError for groups that do not divide a layer's width, more outliers than columns, rotations that the
    family forbids, overrides that fit nothing, and budgets that no choice of grids meets.
    """
    sites = source.sites
    turning = _turning(sites, recipe)
    schemes = _schemes(sites, recipe, turning)
    recipe.check_overrides((site.name for site in sites.weights), schemes.attentions)
    schemes, notes = _centered(source, schemes)
    notes += [f"fit_groups: {text}"] if (text := _fitted_groups(sites, recipe, turning, schemes)) else []
    outer = schemes.linears[sites.embedding.name].weight
    asked = recipe.linear_scheme(sites.embedding.name, "embedding").weight
    if outer is not None and asked is not None and outer.method != asked.method:
        notes.append(f"{sites.embedding.name}: rounded to nearest, as what is looked up has no inputs to calibrate on")
    if sites.tied and outer is not None and recipe.linear_scheme(sites.head.name, "head").weight is None:
        notes.append(f"{sites.head.name}: has the codes of {sites.embedding.name}, whose weight it shares")
    carried, about = _carried(source, recipe)
    notes += [*source.notes, *about, *_limits(sites, recipe, schemes)]
    problem = Problem(
        source=source,
        carried=carried,
        schemes=schemes,
        rotation=turning.rotation,
        dtype=storage_dtype(recipe, source),
        seed=recipe.seed,
        compensate=recipe.compensate,
        share=recipe.compensate_share,
        search=recipe.search,
        budget=recipe.budget,
        wanted=frozenset(name for name, scheme in schemes.linears.items() if scheme.weight is not None),
        settled=frozenset(_settled(sites, recipe)),
        notes=tuple(notes),
        fit_remedy=_OVERRIDDEN if recipe.fit_groups else _FITTED,
    ).check()
    _check_data(problem, recipe)
    if recipe.budget is not None:
        if recipe.budget.inputs is not None and any(site.experts for site in sites.weights):
            raise PaleyError("budget.inputs: what experts lose by rounded inputs is not measured; leave it out")
        _check_widths(recipe, sites.architecture, turning)
        check_budget(problem)
    return problem


def _limits(sites: Sites, recipe: Recipe, schemes: Schemes) -> list[str]:
    """Notes on what the recipe asks for and this model cannot have."""
    notes, outer = [], (sites.embedding, sites.head)
    if sites.architecture.walked:
        notes.append(
            f"{sites.architecture.family!r} has no row: inputs turn at run time, keys are not centred, inputs have no "
            "diagonal, and GPTQ aims at each linear's own outputs"
        )
        if not schemes.attentions and (recipe.keys or recipe.values):
            notes.append("keys and values stay as they are: no attention of this model lets Paley's take its place")
    elif recipe.diagonal and any(site.experts for site in sites.weights):
        notes.append("experts have no diagonal, and GPTQ aims at each expert's own outputs")
    notes += [f"{site.name}: stays unquantized: {site.fixed}" for site in outer if site.fixed]
    if sites.kept:
        reasons = Counter(sites.kept.values())
        told = ", ".join(f"{count} that {why}" if count > 1 else f"one that {why}" for why, count in reasons.items())
        notes.append(f"linears that stay unquantized: {told} ({summed_up(list(sites.kept))})")
    return notes


def under_plan(source: Source, plan: Plan) -> Problem:
    """The problem that a plan has decided, in place of its recipe; raises if it does not fit the model."""
    plan.check_fingerprint(source.fingerprint)
    _check_names(source.sites, plan)
    carried, about = _carried(source, plan.recipe)
    problem = Problem(
        source=source,
        carried=carried,
        notes=(*source.notes, *about),
        schemes=Schemes(plan.linears, plan.attentions),
        rotation=plan.rotation,
        dtype=storage_dtype(plan.recipe, source),
        seed=plan.recipe.seed,
        compensate=plan.recipe.compensate,
        share=plan.recipe.compensate_share,
        search=plan.recipe.search,
        wanted=frozenset(
            site.name
            for site in source.sites.weights
            if (plan.linears[site.name].weight or plan.recipe.linear_scheme(site.name, site.kind).weight) is not None
        ),
    )
    _check_transforms(problem)
    _check_data(problem.check(), plan.recipe)
    return problem


def _carried(source: Source, recipe: Recipe) -> tuple[Mapping[str, TensorInfo], list[str]]:
    """-> (the tensors beside the model that are stored unchanged, a note on what becomes of them)."""
    if not source.extra:
        return {}, []
    names = summed_up(list(source.extra))
    if recipe.extra_tensors == "carry":
        return source.extra, [f"stored unchanged, as no module of the model reads them: {names}"]
    return {}, [f"left out, as no module of the model reads them: {names} (extra_tensors=carry stores them unchanged)"]


def storage_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """The type of tensors that stay unquantized: the checkpoint's own 16-bit type, or float16."""
    if recipe.dtype != "auto":
        return FLOATS[recipe.dtype]
    own = getattr(source.config, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.float16


def _turning(sites: Sites, recipe: Recipe) -> Turning:
    overridden = any(o.weight or o.input for o in recipe.overrides)
    if recipe.widens and (why := sites.architecture.why_stream_is_fixed()) is not None:
        raise PaleyError(
            f"expand and expand_mlp need a folded rotation, which this family forbids: {why}; set them to 0"
        )
    if recipe.expand and sites.architecture.heads_follow:
        raise PaleyError(
            "expand: norms of this family's heads are as wide as its stream, which cannot grow", remedy="set it to 0"
        )
    foldable = recipe.rotate != "auto" or sites.architecture.why_stream_is_fixed() is None
    return decide_turning(
        sites, recipe.rotation if foldable else "online", block=recipe.hadamard, seed=recipe.seed, expand=recipe.expand,
        expand_mlp=recipe.expand_mlp, rotate_output=recipe.rotate_output,
        # What rotates at run time only serves rounding: if none is asked for, the model stays an ordinary one.
        rounds=recipe.weights is not None or recipe.inputs is not None or overridden,
        bits=[scheme.grid.bits for scheme in (recipe.weights, recipe.inputs) if scheme is not None],
    )  # fmt: skip


def _schemes(sites: Sites, recipe: Recipe, turning: Turning) -> Schemes:
    stream = turning.rotation.stream if turning.rotation is not None else None
    width = None if stream is None else stream.out_dim
    _check_pair(sites, recipe)
    linears = {
        site.name: _linear_scheme(recipe, site, turning, sites.shape_in(site, width)[1], sites.architecture.walked)
        for site in sites.weights
    }
    attentions = {}
    for keys, values in zip(sites.of("keys"), sites.of("values"), strict=True):
        heads = turning.heads(keys)
        # Folded, values are rotated inside the weights (R2).
        alike = heads is not None and stream is None and values.shape[1] == keys.shape[1]
        attentions[keys.module] = recipe.attention_scheme(keys.module, heads, rotate_values=alike)
    return Schemes(linears, attentions)


def _centered(source: Source, schemes: Schemes) -> tuple[Schemes, list[str]]:
    """The schemes with what the model's keys can be centred by; and a note, if that is less than was asked for."""
    if source.sites.architecture.walked:
        plain = {
            name: replace(scheme, center_keys=False, balance_keys=False) for name, scheme in schemes.attentions.items()
        }
        return Schemes(schemes.linears, plain), []
    follows, attentions = rope_follows_length(source.config), {}
    for site in source.sites.of("keys"):
        scheme = schemes.attentions[site.module]
        if scheme.center_keys == "bias" and (follows or f"{site.made_by}.bias" not in source.checkpoint):
            scheme = replace(scheme, center_keys=False)
        elif scheme.balance_keys and source.sites.architecture.clips(source.config):
            scheme = replace(scheme, balance_keys=False)
        elif scheme.center_keys == "mean" and follows:
            scheme = replace(scheme, center_keys=True, balance_keys=False)
        attentions[site.module] = scheme
    asked = {s.center_keys for s in schemes.attentions.values() if s.keys is not None}
    notes = ["center_keys: not before RoPE, whose angles depend on the length of the text in this model"]
    return Schemes(schemes.linears, attentions), notes if follows and asked & {"mean", "bias"} else []


def _linear_scheme(
    recipe: Recipe, site: Site, turning: Turning, in_features: int, walked: bool
) -> LinearScheme:  # fmt: skip
    """What the recipe asks of a weight. A row that turns in blocks has a scale for each unless the recipe says so."""
    if site.fixed:
        return LinearScheme()
    scheme = _of_experts(recipe.linear_scheme(site.name, site.kind), site)
    rounds = scheme.weight is not None or scheme.input is not None
    transform = turning.of(site, in_features)
    in_blocks = transform is not None and not turning.is_whole(site)
    if in_blocks and not rounds:
        transform = None
    scheme = replace(scheme, transform=transform)
    scheme = recipe.linear_scheme(site.name, site.kind, transform, scheme.stored_width(in_features))
    scheme = _of_experts(scheme, site)
    if (
        site.kind == "linear"
        and not site.experts
        and not walked
        and transform is not None
        and recipe.wants_diagonal(scheme)
    ):
        scheme = replace(scheme, diagonal=True)
    if in_blocks and transform is not None and scheme.weight is not None and scheme.weight.group_size is None:
        scheme = replace(scheme, weight=replace(scheme.weight, group_size=transform.order))
    if site.kind == "embedding" and scheme.weight is not None:
        scheme = replace(scheme, weight=scheme.weight.without_data)  # rows that are looked up have no inputs
    return scheme


def _of_experts(scheme: LinearScheme, site: Site) -> LinearScheme:
    """A stack of experts has no outliers: each expert would have others."""
    return replace(scheme, outliers=0) if site.experts else scheme


def _check_pair(sites: Sites, recipe: Recipe) -> None:
    """A tied head has the embedding's codes: raises if the recipe asks for others."""
    if not sites.tied:
        return
    head = recipe.linear_scheme(sites.head.name, "head").weight
    embedding = recipe.linear_scheme(sites.embedding.name, "embedding").weight
    if head is None or sites.embedding.fixed:
        return
    if embedding is None:
        raise PaleyError(
            f"{sites.head.name}: shares the weight of {sites.embedding.name} (tie_word_embeddings), which this recipe "
            f"keeps, so it cannot have grid {head.grid.name!r} of its own; set embedding to the same scheme, or "
            "head=null"
        )
    if (embedding.grid, embedding.group_size) != (head.grid, head.group_size):
        raise PaleyError(
            f"{sites.head.name}: shares the weight of {sites.embedding.name} (tie_word_embeddings), so one grid serves "
            f"both, but head has {_grid(head)} and embedding {_grid(embedding)}; set both to one of them"
        )


def _grid(weight: WeightScheme) -> str:
    return repr(weight.grid.name) + (f" in groups of {weight.group_size}" if weight.group_size else "")


def _fitted_groups(sites: Sites, recipe: Recipe, turning: Turning, made: Schemes) -> str:
    """'groups of 160 in 24 layers and 112 in 4, whose width 128 does not divide'; empty if none had to be fitted."""
    if not recipe.fit_groups:
        return ""
    asked = _schemes(sites, recipe.model_copy(update={"fit_groups": False}), turning)
    found: dict[int | None, Counter[int | None]] = {}
    for name, scheme in made.linears.items():
        pairs = ((asked.linears[name].weight, scheme.weight), (asked.linears[name].input, scheme.input))
        sizes = {(before.group_size, after.group_size) for before, after in pairs if before and after}
        for before, after in sizes:
            if before != after:
                found.setdefault(before, Counter())[after] += 1
    return "; ".join(f"{_groups(sizes)}, whose width {before} does not divide" for before, sizes in found.items())


def _groups(sizes: Counter[int | None]) -> str:
    (size, count), *others = sizes.most_common()
    parts = [f"groups of {size} in {count} layer{'s' if count > 1 else ''}", *(f"{s} in {n}" for s, n in others)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if others else parts[0]


def _settled(sites: Sites, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(module, field) of what overrides set."""
    modules = [*(site.name for site in sites.weights), *(site.module for site in sites.of("keys"))]
    for override in recipe.overrides:
        for name in modules:
            if fnmatch.fnmatchcase(name, override.pattern):
                yield from ((name, field) for field in override.model_fields_set)


def _check_data(problem: Problem, recipe: Recipe) -> None:
    """Raises for schemes that need a text, edited into a plan whose recipe gathers none."""
    if calibrates(recipe):
        return
    wanting = [name for name, scheme in problem.schemes.linears.items() if scheme.needs_data]
    wanting += [name for name, scheme in problem.schemes.attentions.items() if scheme.needs_data]
    if wanting:
        raise PaleyError(
            f"plan: {wanting[0]} needs calibration text, which nothing in the plan's own recipe asks for; change "
            "that recipe too (weights.method=gptq), or leave out gptq, outliers and center_keys"
        )


def _check_widths(recipe: Recipe, row: Architecture, turning: Turning) -> None:
    """Raises for an expansion, which no budget counts."""
    stream = turning.rotation.stream if turning.rotation is not None else None
    gated = turning.inputs.get(row.gated)
    for key, what, transform in (("expand", "hidden states", stream), ("expand_mlp", "MLPs", gated)):
        if transform is not None and transform.out_dim != transform.in_dim:
            raise PaleyError(
                f"budget: {key}={getattr(recipe, key)} widens the {what} from {transform.in_dim} to "
                f"{transform.out_dim}, which no budget counts; set {key}=0 (and expand in the plan), or drop the budget"
            )


def _check_names(sites: Sites, plan: Plan) -> None:
    """Raises unless the plan has a scheme for just the weights and attentions of the model."""
    weights = {site.name for site in sites.weights}
    attentions = {site.module for site in sites.of("keys")}
    for wanted, given in ((weights, plan.linears), (attentions, plan.attentions)):
        for name in {*wanted, *given}:
            if name not in given:
                raise PaleyError(f"plan: {name} has no scheme; write one, with nulls to leave it unquantized")
            if name not in wanted:
                raise PaleyError(f"plan: {name} is no layer of this model{nearest_name(name, wanted)}")


def _check_transforms(problem: Problem) -> None:
    """Raises for a transform that does not start at the width that it is applied to."""
    for site, scheme in problem.weights():
        width = problem.shape(site)[1]
        if scheme.weight is None and (scheme.diagonal or (scheme.transform is not None and site.kind == "embedding")):
            raise PaleyError(f"plan: {site.name} keeps its weight; set its transform to null and diagonal to false")
        if scheme.transform is not None and scheme.transform.in_dim != width:
            raise PaleyError(
                f"plan: {site.name} has a transform of {scheme.transform.in_dim} values, but in the plan's rotation it "
                f"reads {width}; the two must agree"
            )
    for site in problem.sites.of("keys"):
        scheme, heads = problem.schemes.attentions[site.module], site.shape[1]
        if scheme.transform is not None and scheme.transform.in_dim != heads:
            raise PaleyError(
                f"plan: {site.module} has a transform of {scheme.transform.in_dim} values, but heads of {heads}"
            )
