"""Partial requantization: the weights of an earlier folder whose schemes a new run has as well, with their very bytes.

What a run from the beginning would make the same is *exact*: the codes of a weight that is rounded by itself, one with
a diagonal if the text is the same, and one that GPTQ calibrates if all before it is the same. Other weights may be kept
all the same; they were fitted to what the layers before them lost in the earlier folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from paley.arch import Site
from paley.core.errors import PaleyError, Setting
from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme, Rotation
from paley.format import spec
from paley.format.checkpoint import Checkpoint
from paley.format.config import FORMAT_VERSION
from paley.methods.diagonal import strength_for
from paley.model.placing import summed_up
from paley.model.problem import Problem
from paley.pipeline.verify import verify
from paley.plan import Plan
from paley.results import Results

__all__ = ["Base", "Kept"]

_WAY_OUT = ("leave ", Setting("base"), " out to quantize all of it")


@dataclass(frozen=True)
class Kept:
    """The weights that are taken over, by name. fitted: those of them that are not exact. beside: of the inputs of kept
    weights, the diagonals, by the name of their tensor. tuned: their scales are tuned afterwards, only codes stay.
    """

    base: Base
    names: frozenset[str] = frozenset()
    fitted: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    tuned: bool = False

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The weight as it is stored, and as a file of a step has it."""
        stored = self.base.stored
        return {name + part: stored[name + part] for part in spec.PARTS if name + part in stored}

    def codes(self, sites: Collection[Site], problem: Problem) -> dict[str, Quantized]:
        """Of those sites that are kept, by name."""
        found = {}
        for site in sites:
            if site.name in self.names:
                scheme = problem.schemes.linears[site.name]
                width = scheme.stored_width(problem.shape(site)[1])
                found[site.name] = spec.decode_linear(site.name, self.base.stored, scheme, width)
        return found

    def diagonals(self, sites: Collection[Site]) -> dict[str, Tensor]:
        names = [site.name + spec.DIAGONAL for site in sites]
        return {name: self.base.stored[name] for name in names if name in self.beside}

    def __str__(self) -> str:
        count, what = self.base.count, "codes" if self.tuned else "bytes"
        text = f"kept {len(self.names)} of {count} weights of {self.base.folder}, the same {what}"
        if not self.fitted:
            return f"{text}, as a run from the beginning would make them"
        return (
            f"{text}; {len(self.fitted)} of them were fitted to what earlier layers lost there, so that a run from the "
            "beginning would choose other codes"
        )


@dataclass(frozen=True)
class Base:
    """A whole quantized folder that `paley quantize --from` names."""

    folder: Path
    stored: Checkpoint
    section: spec.QuantizationConfig
    plan: Plan
    results: Results

    @classmethod
    def open(cls, path: str | Path) -> Base:
        """Errors: PaleyError for a folder that is damaged or none of ours, or of another version of the format."""
        folder = Path(path)
        if not folder.is_dir():
            raise PaleyError(Setting("base", path), ": must be a folder that `paley quantize` wrote")
        stored = Checkpoint.open(folder)
        section = spec.quantization_of(stored)
        version = stored.config["quantization_config"]["format_version"]
        if version != FORMAT_VERSION:
            raise PaleyError(
                f"{folder}: has format version {version}, and only codes of version {FORMAT_VERSION} can be kept",
                remedy=_WAY_OUT,
            )
        verify(folder)
        for name in ("plan.json", "results.json"):
            if not (folder / name).is_file():
                raise PaleyError(f"{folder}: has no {name}, which says what it was made of", remedy=_WAY_OUT)
        plan = Plan.load(folder / "plan.json")
        if plan.recipe.tune is not None:
            raise PaleyError(
                f"{folder}: its scales were tuned after rounding, together with norms that are not kept",
                remedy=_WAY_OUT,
            )
        return cls(folder, stored, section, plan, Results.load(folder / "results.json"))

    @classmethod
    def asked_for(cls, path: str | Path | None, exact: bool) -> Base | None:
        """As `open`; None without a path, which `exact` needs."""
        if path is None and exact:
            raise PaleyError(Setting("exact", True), " says what is kept of an earlier folder: give one with ",
                             Setting("base"))  # fmt: skip
        return None if path is None else cls.open(path)

    @property
    def digest(self) -> str:
        return self.section.digest or ""

    @property
    def count(self) -> int:
        """Quantized weights."""
        return sum(scheme.weight is not None for scheme in self.section.linears.values())

    def check(self, problem: Problem, *, decided: bool) -> None:
        """Raises for another original, for another rotation inside all weights, and, if the problem's schemes are those
        that will be executed, where nothing can be kept.
        """
        if self.plan.fingerprint != problem.source.fingerprint:
            raise PaleyError(
                f"{self.folder}: was made of another original, with fingerprint {self.plan.fingerprint[:16]}; "
                f"{problem.source.path} has {problem.source.fingerprint[:16]}",
                remedy=_WAY_OUT,
            )
        theirs, ours = (_inside(rotation) for rotation in (self.plan.rotation, problem.rotation))
        if theirs != ours:
            why = _difference(theirs, ours, "rotation")
            raise PaleyError(
                f"{self.folder}: all of its weights are in other coordinates: {why}; none can be kept", remedy=_WAY_OUT
            )
        if decided:
            self._alike(problem, None)

    def _alike(self, problem: Problem, texts: Mapping[str, str] | None) -> set[str]:
        """The weights whose codes may be kept; texts None: whatever the texts. Raises if there is none."""
        reasons = {
            site.name: self._unlike(site, problem, texts) for site, s in problem.weights() if s.weight is not None
        }
        if reasons and (why := next(iter(reasons.values()))) and all(reasons.values()):
            raise self._nothing(why)
        return {name for name, why in reasons.items() if why is None}

    def _nothing(self, why: str) -> PaleyError:
        return PaleyError(f"{self.folder}: none of its {self.count} weights can be kept: {why}", remedy=_WAY_OUT)

    def kept(self, problem: Problem, texts: Mapping[str, str], *, exact: bool, tuned: bool = False) -> Kept:
        """What of a decided problem is taken over; texts: sha256 of each by role; exact: nothing else; tuned: as there.

        Raises PaleyError if that is nothing.
        """
        same = self._alike(problem, texts)
        sure = same & self._exact(problem, texts, same)
        if exact and not sure:
            raise self._nothing("they are calibrated behind a layer or a text that changed")
        names = sure if exact else same
        beside = frozenset(name + spec.DIAGONAL for name in names if self.section.linears[name].diagonal)
        return Kept(self, frozenset(names), frozenset(names - sure), beside, tuned)

    def _unlike(self, site: Site, problem: Problem, texts: Mapping[str, str] | None) -> str | None:
        """Why a weight's codes cannot be those of this folder; None if they can."""
        name = site.name
        theirs, ours = self.section.linears.get(name), problem.schemes.linears[name]
        if theirs is None or theirs.weight is None:
            return f"{name} is not quantized there"
        if problem.is_data_free:  # what is done to inputs leaves codes as they are
            theirs, ours = replace(theirs, input=None), replace(ours, input=None)
        if theirs != ours:
            return _difference(theirs, ours, name)
        if (layer := self.results.layers.get(name)) is None or layer.rel_error is None:
            return f"results.json tells no error of {name}"
        if ours.diagonal and site.reads is not None:
            readers = problem.sites[site.reads].readers
            was, now = (
                {other: scheme for other in readers if (scheme := schemes.get(other, LinearScheme())).diagonal}
                for schemes in (self.section.linears, problem.schemes.linears)
            )
            if was.keys() != now.keys():
                return f"{name} shares its diagonal with {summed_up(sorted(was.keys() ^ now.keys()))}, which changed"
            if strength_for(was.values()) != strength_for(now.values()):
                return f"{name} shares its diagonal with a layer whose method changed"
        row = problem.sites.architecture
        if not row.walked and site.writes in (row.queries, row.keys):
            return self._unlike_keys(site, problem, texts)
        return None

    def _unlike_keys(self, site: Site, problem: Problem, texts: Mapping[str, str] | None) -> str | None:
        """Of a linear that makes queries or keys, whose pairs may have been balanced by a text."""
        assert site.block is not None
        name = problem.sites.attention(site.block)
        theirs, ours = self.section.attentions.get(name), problem.schemes.attentions[name]
        if not any(scheme and scheme.balance_keys and scheme.needs_data for scheme in (theirs, ours)):
            return None
        if theirs != ours:
            return f"{name} balances its keys, and {_difference(theirs, ours, 'its scheme')}"
        return (
            None
            if texts is None or (self._same_text(texts) and self._same_original(problem))
            else f"{name} balances its keys by what the original computes on the calibration text, which changed"
        )

    def _same_text(self, texts: Mapping[str, str]) -> bool:
        theirs = self.results.texts.get("calibration")
        return theirs is not None and theirs == texts.get("calibration")

    def _same_original(self, problem: Problem) -> bool:
        """Whether what is measured of the original is the same: weights that stay unquantized are rounded to a type."""
        linears = problem.schemes.linears
        theirs, ours = (
            {name for name, scheme in schemes.items() if scheme.weight is not None}
            for schemes in (self.section.linears, linears)
        )
        return theirs == ours and str(self.stored.config.get("dtype")) == _name(problem.dtype)

    def _exact(self, problem: Problem, texts: Mapping[str, str], same: set[str]) -> set[str]:
        """The weights that a run from the beginning would make the same, of those whose schemes are."""
        linears, sites = problem.schemes.linears, problem.sites
        free = {name for name in same if not linears[name].needs_data}
        dtype = str(self.stored.config.get("dtype"))
        aim = (self.plan.recipe.compensate, self.plan.recipe.compensate_share)
        settings = (problem.compensate, problem.share, _name(problem.dtype)) == (*aim, dtype)
        inherited = self.results.kept is not None and self.results.kept.fitted > 0  # of which nothing tells the names
        if inherited or not settings or not self._same_text(texts):
            return free
        balanced = {name for name in same if not linears[name].calibrated} if self._same_original(problem) else set()
        before: set[str] = set()
        for step in [[sites.embedding], *(sites.of("linear", block=i) for i in range(sites.blocks)), [sites.head]]:
            block = step[0].block if step else None
            attentions = set() if block is None else {site.module for site in sites.of("keys", block=block)}
            pairs = [(linears.get(site.name), self.section.linears.get(site.name)) for site in step]
            pairs += [(problem.schemes.attentions[name], self.section.attentions.get(name)) for name in attentions]
            if any(ours != theirs for ours, theirs in pairs):
                break
            before |= {site.name for site in step}
        return free | balanced | before


def _inside(rotation: Rotation | None) -> Rotation | None:
    """The rotation, if weights are in its coordinates; that of heads alone acts on queries and keys as they run."""
    return None if rotation is None or rotation.stream is None else rotation


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(theirs: Any, ours: Any, path: str) -> str:
    """'NAME.weight.group_size is 64 there and 32 here': the first field that differs."""
    if is_dataclass(theirs) and type(theirs) is type(ours) and not hasattr(theirs, "name"):
        for field in fields(theirs):
            pair = getattr(theirs, field.name), getattr(ours, field.name)
            if pair[0] != pair[1]:
                return _difference(*pair, f"{path}.{field.name}")
    return f"{path} is {_short(theirs)} there and {_short(ours)} here"


def _short(value: Any) -> str:
    if value is None:
        return "null"
    return str(getattr(value, "name", None) or (f"a {type(value).__name__}" if is_dataclass(value) else value))
