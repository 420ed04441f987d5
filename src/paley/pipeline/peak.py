"""How much memory a run takes at its peak, and what of it keeps the whole model there."""

from __future__ import annotations

import math

import torch

from paley import kernels
from paley.core.defaults import SELF
from paley.core.errors import Setting
from paley.methods.sensitivity import method_for
from paley.methods.tuning import PIECE
from paley.model import steps
from paley.model.problem import Problem
from paley.model.tuning import ACTIVATIONS, activation_bytes
from paley.pipeline.costs import COSTS, FLOAT, Text, count_tokens, read_by_keys, read_of
from paley.pipeline.worker_memory import of_gradients
from paley.recipe import Recipe

__all__ = ["cached", "held_by_a_token", "in_memory", "memory", "states"]


def in_memory(recipe: Recipe, *, decided: bool, measured: bool) -> tuple[str | Setting, ...]:
    """What of a recipe needs the whole model in memory, as a way out of it; empty if nothing does."""
    if recipe.calibration.source == SELF:
        return ("take a text that is there instead of one that the model writes: ", Setting("calibration.source"))
    if recipe.search.method != "none" and not decided:
        return ("leave the search out: ", Setting("search.method", "none"))
    if recipe.budget is not None and not decided and not measured:
        return (
            "measure the sensitivities first, by noise, which holds a block at a time, and give them: ",
            Setting("sensitivity"),
        )
    return ()


def _standing(problem: Problem, tokens: int) -> float:
    """What forwards of a block and of its original hold: both up to the last input, where the original goes on."""
    last = held_by_a_token(problem)
    before = steps.held(problem.sites.head.shape[1], 0)
    return max(min(steps.KEPT, tokens * last), 2 * min(steps.KEPT, tokens * before))


def held_by_a_token(problem: Problem) -> int:
    """Bytes of one forward through a block, as it stands still while a linear is quantized."""
    widest = max((problem.shape(site)[-1] for site in problem.sites.of("linear")), default=0)
    return steps.held(problem.sites.head.shape[1], widest)


def _tuning_memory(problem: Problem, recipe: Recipe, whole: float) -> float:
    """whole: bytes of the float32 model. The original comes and goes before weights are written out."""
    assert recipe.tune is not None
    sites, seq_len = problem.sites, recipe.calibration.seq_len
    row = FLOAT * seq_len * sites.head.shape[1]
    held = activation_bytes(problem.sites, seq_len)
    if held > ACTIVATIONS:
        held = held // max(1, sites.blocks) + 2 * sites.blocks * row
    logits = COSTS.pieces * FLOAT * max(PIECE, sites.head.shape[0])
    known = recipe.tune.sequences * row + FLOAT * sites.head.numel + COSTS.coded * whole
    tuned = COSTS.coded * whole + (0.5 if kernels.multiplies_bfloat16(torch.device("cpu")) else 1.0) * whole
    return known + max(COSTS.loaded * whole, tuned + held + logits)


def cached(problem: Problem, text: Text) -> int:
    """Bytes of the caches of a whole text, as all of it passes through a paged model together; 0 if none is rounded."""
    sites = list(problem.sites.of("keys", "values"))
    schemes = [getattr(problem.schemes.attentions[site.module], site.kind) for site in sites]
    if not any(schemes):
        return 0
    bits = [8 * FLOAT if s is None else s.grid.bits + 16 / (s.group_size or 16) for s in schemes]
    return math.ceil(count_tokens(text) * sum(site.numel * b for site, b in zip(sites, bits, strict=True)) / 8)


def states(problem: Problem, recipe: Recipe) -> int:
    """Bytes on disk of the hidden states of a calibration: of two blocks, in the quantized model and the original,
    and those that keys are measured on.

    A model that is tuned stays in memory, and they with it.
    """
    if problem.is_data_free or recipe.tune is not None:
        return 0
    text = recipe.calibration
    tokens = 4 * count_tokens(read_of(text, problem)) + 2 * read_by_keys(text, problem)
    return FLOAT * tokens * problem.sites.head.shape[1]


def memory(
    problem: Problem, recipe: Recipe, *, decided: bool = False, measured: bool = False, paged: bool = False
) -> int:
    """The peak: of the model, or of the largest block if it is paged, with what a run holds beside it."""
    sites, found = problem.sites, []
    whole = FLOAT * sum(site.numel for site in sites.weights)
    outer = FLOAT * sum(site.numel for site in sites.weights if site.block is None)
    blocks = [sum(site.numel for site in sites.of("linear", block=index)) for index in range(sites.blocks)]
    block = FLOAT * max(blocks)
    if in_memory(recipe, decided=decided, measured=measured):
        found.append(COSTS.decided * whole)
        budget = recipe.budget
        if budget is not None and not measured and (budget.method or method_for(budget.metric)) == "gradients":
            found.append(of_gradients(sites, budget.seq_len) - COSTS.base)
    if recipe.test is not None:
        hidden = FLOAT * count_tokens(recipe.test) * sites.head.shape[1]
        held = COSTS.scored * whole
        if paged:
            held = COSTS.scored_paged * (outer + block) + 2 * hidden + cached(problem, recipe.test)
        found.append(held + 2 * hidden)
    unpaged = (COSTS.folded if problem.folded else COSTS.model) * whole
    if problem.is_data_free:
        largest = COSTS.tensor * FLOAT * max(site.numel for site in sites.weights)
        found.append(largest if recipe.tune is None else unpaged)
    else:
        tokens = count_tokens(read_of(recipe.calibration, problem))
        hidden = FLOAT * tokens * sites.head.shape[1]
        keys = FLOAT * read_by_keys(recipe.calibration, problem) * sites.head.shape[1]
        one = max((FLOAT * math.prod(problem.shape(site)[1:]) ** 2 for site in sites.of("linear")), default=0)
        held = problem.waiting_dtype.itemsize / FLOAT * outer + COSTS.block * block + COSTS.squares * one
        if not problem.source.has_pages or recipe.tune is not None:
            held = max(held, unpaged)
        found.append(held + 2 * hidden + keys + _standing(problem, tokens))
    if recipe.tune is not None:
        found.append(_tuning_memory(problem, recipe, whole))
    runs = recipe.test is not None or not problem.is_data_free
    return math.ceil(COSTS.base + runs * COSTS.kept + max(found))
