"""What a run takes: bytes on disk exactly, seconds and memory about, before any of it is done.

Work is counted in operations of float32 matrix products, whose rate is measured on the machine. Everything else counts
as many as products do in its time, by COSTS; `bench/estimates.py` shows how far from the truth that is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from paley import kernels
from paley.arch import Site
from paley.core.defaults import SELF
from paley.core.errors import PaleyError, Setting
from paley.core.schemes import ActivationScheme
from paley.core.trellis import TrellisGrid
from paley.eval.scoring import CHUNK
from paley.kernels.floats import are_quicker
from paley.methods import diagonal
from paley.methods.sensitivity import method_for
from paley.methods.trellis import AHEAD, KEEP
from paley.model.activation_errors import Place
from paley.model.budget import activation_options, fed_back
from paley.model.problem import Problem
from paley.model.steps import KEPT
from paley.model.tuning import ACTIVATIONS, activation_bytes
from paley.pipeline import peak, texts
from paley.pipeline.costs import COSTS, Amount, Text, count_tokens, read_by_keys, read_of
from paley.pipeline.machine import free_memory, multiplications
from paley.pipeline.monitor import duration
from paley.pipeline.resolve import resolve
from paley.pipeline.sensitivities import SOME
from paley.recipe import Budget, Recipe, apply_settings, preset

__all__ = ["Estimate", "check_memory", "estimate_run", "faster"]

LONG = 300.0  # seconds from which on a faster way is worth a word
_FEW = 16  # sequences that a calibration should have


@dataclass(frozen=True)
class Estimate:
    """bytes: of all tensors on disk; original_bytes: of the original's. memory: bytes at the peak.

    stages: name -> seconds of each stage that is to come. paged: whether memory holds a block of the model at a time
    as it is scored. states: bytes on disk until the run is done.
    """

    bytes: int
    original_bytes: int
    memory: int
    stages: Mapping[str, float]
    paged: bool = False
    states: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    def __str__(self) -> str:
        return (
            f"estimate: {duration(self.seconds)}, {self.memory / 2**30:.1f} GiB of memory, "
            f"{self.bytes / 1e6:.1f} MB on disk (the original {self.original_bytes / 1e6:.1f})"
            + (f", {self.states / 1e6:.1f} MB beside it until it is done" if self.states >= 1e5 else "")
        )


def estimate_run(problem: Problem, recipe: Recipe, *, decided: bool = False, measured: bool = False) -> Estimate:
    """decided: a plan is executed, so that nothing is searched; measured: a budget's slopes are there already.

    Of a budget, only a limit of size is known beforehand: else bytes are those of the recipe's own grids.
    """
    needs = {"decided": decided, "measured": measured}
    memory, paged = peak.memory(problem, recipe, **needs), False
    if problem.source.has_pages and (other := peak.memory(problem, recipe, **needs, paged=True)) < memory:
        memory, paged = other, True
    work, rate = _Work(problem, recipe, paged), multiplications()
    stages = {name: operations / rate for name, operations in work.stages(decided, measured) if operations}
    return Estimate(
        _bytes(problem), problem.source.checkpoint.nbytes, memory, stages, paged, peak.states(problem, recipe)
    )


def check_memory(
    problem: Problem, recipe: Recipe, needed: int, free: int | None = None, *, decided: bool = False,
    measured: bool = False,
) -> None:  # fmt: skip
    """Raises if a run needs more than is free, and names the largest setting that fits; decided, measured: as above."""
    free = free_memory() if free is None else free
    if free is None or needed <= free:
        return
    paged = problem.source.has_pages

    def fits(other: Recipe) -> bool:
        return peak.memory(problem, other, decided=decided, measured=measured, paged=paged) <= free

    untuned = recipe.model_copy(update={"tune": None})
    if recipe.tune is not None and fits(untuned):
        least = peak.memory(problem, untuned, decided=decided, measured=measured, paged=paged)
        raise PaleyError(
            f"memory: tuning needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            remedy=("leave it out (", Setting("tune", "null"), f"), which needs {least / 2**30:.1f} GiB"),
        )
    remedy = peak.in_memory(recipe, decided=decided, measured=measured)
    sequences = recipe.calibration.sequences
    while not remedy and not problem.is_data_free and (sequences := sequences // 2):
        if fits(apply_settings(recipe, [("calibration.sequences", sequences)])):
            remedy = ("use ", Setting("calibration.sequences", sequences))
    if not remedy and recipe.test is not None and fits(recipe.model_copy(update={"test": None})):
        remedy = ("leave the score out: ", Setting("test", "null"))
    raise PaleyError(
        f"memory: this run needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
        remedy=remedy or ("use the preset higgs-4 without a score, which needs no more than the largest tensors",),
    )


def faster(problem: Problem, recipe: Recipe, estimated: Estimate) -> str:
    """What to say once of a run that takes minutes: the recipes that take at most half of its time; else ''."""
    if estimated.seconds < LONG:
        return ""
    others: dict[str, Recipe] = {}
    if recipe.search.method != "none":
        others["search.method=none"] = apply_settings(recipe, ["search.method=none"])
    if not problem.is_data_free:
        if recipe.calibration.sequences > _FEW:
            others[f"calibration.sequences={_FEW}"] = apply_settings(recipe, [f"calibration.sequences={_FEW}"])
        if recipe.weights is not None:
            name = f"higgs-{min(8, max(2, round(recipe.weights.grid.bits)))}"
            others[f"the preset {name}, without calibration"] = preset(name).model_copy(update={"test": recipe.test})
    found = {}
    for name, other in others.items():
        seconds = estimate_run(resolve(problem.source, other), other).seconds
        if seconds <= estimated.seconds / 2:
            found[name] = seconds
    said = "; ".join(f"{name}, {duration(seconds)}" for name, seconds in found.items())
    return f"faster, perhaps less accurate: {said}" if said else ""


class _Work:
    """Operations of the stages of a run."""

    def __init__(self, problem: Problem, recipe: Recipe, paged: bool):
        self.problem, self.recipe, self.sites, self.paged = problem, recipe, problem.sites, paged
        self.native = 1.0 if kernels.backend() == "native" else COSTS.torch
        self.calibrating = COSTS.bfloat16 if kernels.multiplies_bfloat16(torch.device("cpu")) else 1.0
        self.scoring = COSTS.onednn if are_quicker() else 1.0
        self.linears, self.read = self.sites.of("linear"), COSTS.read * problem.source.checkpoint.nbytes

    def stages(self, decided: bool, measured: bool) -> Iterator[tuple[str, float]]:
        """(name, operations) in the order in which a run has them."""
        recipe, problem, test = self.recipe, self.problem, self.recipe.test
        calibrates = not problem.is_data_free or recipe.tune is not None
        if written := self._written(recipe.calibration.source, self._calibration_text()):
            yield "sampling the calibration text", written
        if recipe.search.method != "none":
            source = recipe.search.source or recipe.calibration.source
            if written := self._written(source, recipe.search):
                yield "sampling the search text", written
        if test is not None:
            yield "measuring the original", self.read + self._scored(test, 1, rounded=False)
        if problem.budget is not None and not decided and not measured:
            yield "measuring sensitivities", self.read + self._slopes()
        if problem.budget is not None and not decided:
            if options := activation_options(problem):
                yield "measuring what rounding loses of keys, values and inputs", self.read + self._tried(options)
            feedback = fed_back(problem)
            if feedback or any(scheme.diagonal for scheme in problem.schemes.linears.values()):
                yield "measuring what diagonals and feedback gain", self.read + self._gains(feedback)
        if problem.search.method != "none" and not decided:
            yield "quantizing weights for the search", self.read + self._calibrated()
            yield "searching clip ratios", self._searched()
        written = self.read + COSTS.written * sum(site.numel for site in self.sites.weights)
        if calibrates:
            yield "quantizing weights", self.read + self._calibrated() + self._outer()
            if recipe.tune is not None:
                yield (
                    "measuring the original on the text to tune on",
                    self.read + self._scored(self._tuned(1), 1, rounded=False),
                )
                yield "tuning", self._tuning()
            yield "saving and reading back", written
        else:
            yield "quantizing weights", self._outer() + sum(self._nearest(site) for site in self.linears)
            yield "writing the checkpoint", written
        if test is not None:
            yield "evaluating through the quantized cache", self._reread(test) + self._scored(test, 2, rounded=True)

    def _written(self, source: str, text: Text) -> float:
        """A text that the model writes, if the source is that."""
        if source != SELF or not text.sequences:
            return 0.0
        head = 2 * count_tokens(text) * self.sites.head.numel
        return self.read + COSTS.sampled * (head + self._forward(count_tokens(text), text.seq_len, rounded=False))

    def _calibration_text(self) -> Amount:
        """With what is tuned on, as both are cut from one text."""
        text, tune = self.recipe.calibration, self.recipe.tune
        calibration = text.sequences if texts.calibrates(self.recipe) else 0
        return Amount(calibration + (0 if tune is None else tune.sequences), text.seq_len)

    def _forward(self, tokens: float, seq_len: int, *, rounded: bool, product: float = 1.0) -> float:
        """All blocks once; product: of a linear, times that of float32."""
        weights = product * sum(site.numel for site in self.linears)
        heads = getattr(self.problem.source.config, "num_attention_heads", None) or 1
        reads = sum(heads * site.shape[1] * site.tokens(seq_len) for site in self.sites.of("keys"))
        return tokens * (2 * weights + 4 * reads + (self._turned(1.0) if rounded else 0))

    def _turned(self, times: float) -> float:
        """What linears and caches do to what a token reads there, `times` for the inputs."""
        schemes, total = self.problem.schemes, 0.0
        for site in self.sites.of("input"):
            for scheme in {schemes.linears[name] for name in site.readers if self.sites[name].kind == "linear"}:
                own = (scheme.transform is not None) * COSTS.turned + (scheme.input is not None) * COSTS.rounded
                total += times * own * site.numel
        for site in self.sites.of("keys", "values"):
            total += (getattr(schemes.attentions[site.module], site.kind) is not None) * COSTS.rounded * site.numel
        return total

    def _scored(self, text: Text, models: int, *, rounded: bool) -> float:
        """A text through the model, and its logits; models: whose logits are compared."""
        tokens = count_tokens(text)
        head = self.scoring * 2 * self.sites.head.numel + COSTS.logit * self.sites.head.shape[0]
        return self._forward(tokens, text.seq_len, rounded=rounded, product=self.scoring) + tokens * head * models

    def _reread(self, text: Text) -> float:
        """Blocks that memory does not hold, read and decoded anew for each piece that passes through the cache."""
        if not self.paged:
            return 0.0
        times = math.ceil((text.seq_len - 1) / CHUNK) if peak.cached(self.problem, text) else 1
        read = COSTS.read * _bytes(self.problem) + COSTS.written * sum(site.numel for site in self.sites.weights)
        return times * read

    def _calibrated(self) -> float:
        """Every block: two forwards, sums, and what GPTQ does to each weight."""
        given, schemes = self.recipe.calibration, self.problem.schemes
        text = read_of(given, self.problem)
        tokens = count_tokens(text)
        # What is not held begins anew for each input.
        anew = COSTS.anew * max(0.0, 1 - KEPT / max(1, tokens * peak.held_by_a_token(self.problem)))
        forward = self._forward(tokens, text.seq_len, rounded=True, product=self.calibrating)
        total = 2 * (1 + anew) * forward + tokens * self._turned(2.0)
        some = min(tokens, diagonal.TOKENS) if any(s.diagonal for s in schemes.linears.values()) else 0
        some += read_by_keys(given, self.problem)
        total += self._forward(some, given.seq_len, rounded=False, product=self.calibrating)
        for site in self.sites.of("input"):
            readers = [self.sites[name] for name in site.readers if self.sites[name].kind == "linear"]
            readers = [reader for reader in readers if schemes.linears[reader.name].calibrated]
            if readers:
                width = schemes.linears[readers[0].name].stored_width(site.shape[0])
                alone = len(readers) == 1 and readers[0].adds_to_stream
                aimed = 0 if self.problem.compensate == "plain" else readers[0].shape[0] if alone else width
                sums = 2 * tokens * width * (0.5 * width + aimed)
                total += self.calibrating * sums + COSTS.factor * width**3
        return total + sum(self._gptq(site) for site in self.linears)

    def _gptq(self, site: Site) -> float:
        scheme = self.problem.schemes.linears[site.name]
        if scheme.weight is None or not scheme.calibrated:
            return self._nearest(site)
        rows, columns = self.problem.shape(site)
        columns, sweeps = scheme.stored_width(columns), scheme.weight.sweeps
        grid = scheme.weight.grid
        if isinstance(grid, TrellisGrid):
            looked_at = 1 + AHEAD * grid.memory / KEEP
            loops, sweeps = COSTS.trellis * looked_at / grid.p * self.native, min(sweeps, 1)
        else:
            loops = (1 + sweeps) * COSTS.loop[min(grid.p, 4)] * self.native
        products = (COSTS.target + COSTS.sweep * sweeps) * rows * columns**2
        return products + (loops + COSTS.packed) * rows * columns

    def _nearest(self, site: Site) -> float:
        scheme = self.problem.schemes.linears[site.name].weight
        if scheme is None:
            return 0.0
        cost = COSTS.trellis / scheme.grid.p if scheme.grid.sequential else COSTS.nearest
        return cost * self.native * site.numel

    def _outer(self) -> float:
        return sum(self._nearest(site) for site in self.sites.of("embedding", "head") if site.stored_as == site.name)

    def _tuned(self, epochs: int) -> Amount:
        tune = self.recipe.tune
        assert tune is not None
        return Amount(tune.sequences * epochs, self.recipe.calibration.seq_len)

    def _tuning(self) -> float:
        """Forward, back, and the logits of both models; where blocks run twice, one forward more."""
        assert self.recipe.tune is not None
        text, head = self._tuned(self.recipe.tune.epochs), self.sites.head
        passes = 2 + self.calibrating * (1 + (activation_bytes(self.problem.sites, text.seq_len) > ACTIVATIONS))
        forward = self._forward(count_tokens(text), text.seq_len, rounded=True, product=self.calibrating)
        logits = 6 * self.calibrating * head.numel + 4 * COSTS.logit * head.shape[0]
        return passes * forward + count_tokens(text) * logits

    def _searched(self) -> float:
        """The trials of each number: the paper's through the whole model, ours through half of it on average.

        Most of our starts were tried already: SmolLM2-135M's 180 numbers took 425 trials.
        """
        search, head = self.recipe.search, self.sites.head
        knobs = 6 * self.sites.blocks if search.slots == "shared" else 8 * self.sites.blocks
        tokens = count_tokens(search)
        product = min(self.calibrating, self.scoring)
        blocks = self._forward(tokens, search.seq_len, rounded=True, product=product)
        logits = tokens * (product * 2 * head.numel + COSTS.compared * head.shape[0])
        starts, share = (1.0, 1.0) if search.schedule == "paper" else (0.5, 0.5)
        return knobs * (starts + search.trials) * (share * blocks + logits)

    def _slopes(self) -> float:
        """There and back once; of noise, each weight at each level through half of the model on average. And logits."""
        budget = self._budget
        written = self._written(budget.source, budget)
        if (budget.method or method_for(budget.metric)) == "gradients":
            return written + 3 * self._scored(budget, 1, rounded=False)
        return written + len(self.sites.weights) * budget.levels * (0.5 * self._scored(budget, 1, rounded=False))

    def _tried(self, options: Mapping[Place, tuple[ActivationScheme, ...]]) -> float:
        """A few sequences through the model, their keys, values and inputs rounded in all ways that may be chosen."""
        some = self._some()
        widths = {(site.module, site.kind): site.numel for site in self.sites.of("keys", "values")}
        widths |= {(site.name, "input"): site.shape[1] for site in self.linears}
        rounded = COSTS.rounded * sum(len(schemes) * widths[place] for place, schemes in options.items())
        forward = self._forward(count_tokens(some), some.seq_len, rounded=False)
        return self._written(self._budget.source, some) + count_tokens(some) * rounded + forward

    def _gains(self, feedback: Collection[str]) -> float:
        """A forward pass; of inputs of the weights with feedback the Gram matrix and its factor, of others squares."""
        text = self.recipe.calibration if feedback else self._some()
        total = 0.0 if feedback else self._written(self._budget.source, text)
        total += self._forward(count_tokens(text), text.seq_len, rounded=False)
        for site in self.sites.of("input"):
            if any(name in feedback and not self.sites[name].experts for name in site.readers):
                total += count_tokens(text) * site.numel**2 + COSTS.factor * site.numel**3
        return total

    @property
    def _budget(self) -> Budget:
        assert self.problem.budget is not None
        return self.problem.budget

    def _some(self) -> Amount:
        return Amount(min(SOME, self._budget.sequences), self._budget.seq_len)


def _bytes(problem: Problem) -> int:
    """Of all tensors on disk."""
    if problem.budget is not None and problem.budget.size is not None:
        return problem.budget.size
    weights = {name for site, _ in problem.weights() for name in problem.sites.held_as(site)}
    others = {name: p.numel() for name, p in problem.source.skeleton.named_parameters() if name not in weights}
    rest = sum(_values(problem, name, count) for name, count in others.items()) * problem.dtype.itemsize
    centered = sum(scheme.mean_keys for scheme in problem.schemes.attentions.values())
    means = centered * 2 * max((site.numel for site in problem.sites.of("keys")), default=0)  # float16
    return sum(problem.stored_bytes(site) for site, _ in problem.weights()) + rest + means


def _values(problem: Problem, name: str, count: int) -> int:
    """Values of a norm or a bias that has `count` in the original: more where the residual stream is widened."""
    if (site := problem.sites.get(name.rpartition(".")[0])) is not None:
        return problem.shape(site)[0]
    stream = problem.rotation.stream if problem.rotation is not None else None
    return stream.out_dim if stream is not None and count == stream.in_dim else count
