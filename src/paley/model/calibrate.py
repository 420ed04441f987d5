"""Quantizes a model's weights step by step: the embedding, block by block, the head; each sees what came before it.

Beside the block at work a copy of the original runs, on the original's inputs, so that GPTQ can aim at the
original outputs. Memory beside the model: that copy, the hidden states of the calibration tokens twice, what both
forwards hold at a stop (`steps.KEPT` bytes each), and the packed codes of the blocks that are done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paley.arch import Site
from paley.core.errors import PaleyError
from paley.core.metrics import rel_error, rel_error_of
from paley.core.rounding import Quantized, check_range, joined
from paley.core.schemes import LinearScheme, Schemes
from paley.format.spec import DIAGONAL, check_outliers
from paley.methods.diagonal import TOKENS, balance, strength_for
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import quantize_nearest, quantize_turned, turned_error
from paley.methods.statistics import InputStatistics
from paley.model.adapter import Block
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.coded import Coded
from paley.model.compared import ComparedBlock
from paley.model.embedding import QuantEmbedding
from paley.model.experts import QuantExperts
from paley.model.gathered import GatheredBlock
from paley.model.key_statistics import KeySettler
from paley.model.linear import QuantLinear
from paley.model.reading import tie_head_
from paley.model.stacks import put_
from paley.model.wrapping import set_input_
from paley.ops.matmul import CALIBRATION

__all__ = ["LayerReport", "ModelQuantizer"]

OnLayer = Callable[["LayerReport"], None]
Place = Callable[[str, Tensor], Tensor]
_NOTHING: Mapping[str, Tensor] = {}
_VALUES = 2**22  # of a weight that are decoded at a time
_OUTLIER_SEQUENCES = 32  # that outliers are chosen by


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight: ||W - Ŵ||² / ||W||² against the rotated weight, and its codes.

    quantized is None once the codes are packed into the layer and written away. experts: the error of each matrix of a
    stack.
    """

    name: str
    rel_error: float
    quantized: Quantized | None
    experts: tuple[float, ...] = ()


class ModelQuantizer:
    """Walks a wrapped model: `embedding`, each `block` in order, `head`; or takes their codes, if they exist already.

    ids [sequences, seq_len]: the calibration tokens; None if no weight needs any. compensate: as in Recipe,
    share: its `compensate_share`. keys: what measures keys, and balances them, before a block's weights are quantized.
    begin: called before the turn of each block, and with None before the head's, if they are wrapped only then.
    place(name, hidden states) -> where those behind the block are written: that very tensor, unless the run keeps both.
    release: called when hidden states are not read for a while.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor | None, schemes: Schemes, *, compensate: str, share: float = 1.0,
        keys: KeySettler | None = None, begin: Callable[[Block | None], None] = lambda _: None,
        place: Place = lambda _, hidden: hidden, release: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.runner, self.adapter, self.ids, self.keys, self.begin = runner, runner.adapter, ids, keys, begin
        self.linears, self.attentions, self.place, self.release = schemes.linears, schemes.attentions, place, release
        self.compensate, self.share = compensate, share if compensate != "plain" else 0.0
        self.hidden: Tensor | None = None
        self.original: Tensor | None = None
        self.unreached: dict[str, list[int]] = {}  # experts that no token of the text reached

    @torch.no_grad()
    def embedding(self, known: Mapping[str, Quantized], on_layer: OnLayer = lambda _: None) -> list[LayerReport]:
        """Rounds the embedding, and of a tied pair the head with it, and looks the calibration tokens up."""
        site = self.adapter.sites.embedding
        if self.ids is not None:
            self.original = self._placed("original", self.runner.embed(self.ids))
        reports: list[LayerReport] = []
        if self.linears[site.name].weight is not None:
            reports.append(self._quantize_embedding(site, known.get(site.name)))
            on_layer(reports[0])
        if self.original is not None and self.ids is not None:
            hidden = self.runner.embed(self.ids) if reports else self.original.clone()
            self.hidden = self._placed("hidden", hidden)
        return reports

    def _placed(self, name: str, hidden: Tensor) -> Tensor:
        place = self.place(name, hidden)
        return hidden if place is hidden else place.copy_(hidden)

    @torch.no_grad()
    def block(
        self, index: int, known: Mapping[str, Quantized], beside: Mapping[str, Tensor] = _NOTHING,
        on_layer: OnLayer = lambda _: None,
    ) -> list[LayerReport]:  # fmt: skip
        """Quantizes block `index` in place -> a report for each of its quantized linears.

        known: codes that are there already, by name; beside: with codes, what `beside` gave of the block then.
        """
        block = self.adapter.blocks[index]
        self.begin(block)
        if self.keys is not None:
            self.keys.settle(block, beside)
        if self.original is not None:
            for linear in self._wrapped(block):
                linear.prepare_(CALIBRATION)
        self._balance(block, beside)
        reference = copy.deepcopy(block.module)
        self._choose_outliers(block, reference, known)
        self._activate(block)
        made = {}

        def replace_by(site: Site, q: Quantized) -> None:
            made[site.name] = self._replace_linear(site, q)
            on_layer(made[site.name])

        linears = list(block.linears())
        for site in linears:  # before a forward stands anywhere, which would go on through what was there
            if site.name in known:
                replace_by(site, known[site.name])
        groups = {site: self._alike(site, known) for site in block.inputs()}
        wanted = {site: [g for g in groups[site] if self._is_calibrated(g)] for site in groups}
        with self._compared(block, reference, [site for site in wanted if wanted[site]]) as both:
            for read in groups:
                statistics = both.statistics(read, wanted[read]) if both is not None and wanted[read] else {}
                self.release()
                for alike in groups[read]:
                    for site in alike:
                        by_expert = site.experts and self.linears[site.name].calibrated
                        replace_by(site, self._expert_codes(block, site) if by_expert else
                                   self._codes(site, statistics.get(alike)))  # fmt: skip
            if both is not None:
                self.hidden, self.original = both.finish()
        for linear in self._wrapped(block):
            linear.prepare_("packed")
        for module in reference.modules():
            if isinstance(module, QuantLinear | QuantExperts):
                module.retire_()
        return [made[site.name] for site in linears if site.name in made]

    def read_no_more(self) -> None:
        """Lets go of the text: from here on all codes are known."""
        self.hidden = self.original = None

    def states(self) -> dict[str, Tensor]:
        """What goes on from block to block beside `hidden` and `original`: the keys' own text."""
        return {} if self.keys is None else {f"keys-{i}": hidden for i, hidden in enumerate(self.keys.hidden)}

    def placed(self) -> dict[str, Tensor]:
        """What `place` is asked for, by name."""
        both = {"hidden": self.hidden, "original": self.original}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def go_on(self, states: Mapping[str, Tensor]) -> None:
        """Goes on behind a block: with what `place` and `states` had there."""
        if self.hidden is not None and "hidden" in states:
            self.hidden, self.original = states["hidden"], states["original"]
        if self.keys is not None:
            self.keys.hidden = [states[name].clone() for name in self.states()]

    def _wrapped(self, block: Block) -> Iterator[QuantLinear | QuantExperts]:
        modules = (self.adapter.module(site.module) for site in block.linears())
        return (module for module in modules if isinstance(module, QuantLinear | QuantExperts))

    @torch.no_grad()
    def head(self, known: Mapping[str, Quantized], on_layer: OnLayer = lambda _: None) -> list[LayerReport]:
        """Quantizes an untied head, calibrated on what the final norm makes of the last hidden states."""
        self.begin(None)
        site = self.adapter.sites.head
        if site.stored_as != site.name or (scheme := self.linears[site.name]).weight is None:
            return []
        linear = self.adapter.head
        if not isinstance(linear, QuantLinear) and not scheme.calibrated:
            q, error = self._to_nearest(site, linear.weight, known.get(site.name))
            made = QuantLinear.from_linear(linear, scheme, q, name=site.name)
            made.prepare_("packed")
            self.adapter.model.set_submodule(site.module, made)
            on_layer(report := LayerReport(site.name, error, q))
            return [report]
        if not isinstance(linear, QuantLinear):
            linear = QuantLinear.from_linear(linear, LinearScheme(), None, name=site.name)
            self.adapter.model.set_submodule(site.module, linear)
        statistics = None
        if site.name not in known and scheme.calibrated and self.hidden is not None:
            assert self.original is not None
            statistics = InputStatistics()
            for pair in zip(*(h.split(self.runner.batch) for h in (self.hidden, self.original)), strict=True):
                read = (self.runner.head_input(h, linear) for h in pair)
                statistics.add(*(linear.round_input(x).flatten(0, -2) for x in read))
        q = known[site.name] if site.name in known else self._codes(site, statistics)
        report = self._replace_linear(site, q)
        on_layer(report)
        return [report]

    def beside(self, index: int) -> dict[str, Tensor]:
        """What block `index` stores beside its codes: diagonals, and what was settled of its keys, by name."""
        linears = self.adapter.blocks[index].linears()
        found = {site.name + DIAGONAL: getattr(self.adapter.module(site.module), "diagonal", None) for site in linears}
        found |= {} if self.keys is None else self.keys.settled
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _balance(self, block: Block, known: Mapping[str, Tensor]) -> None:
        """Gives the linears of each input the diagonal that balances what weights and inputs lose."""
        groups = [[name for name in site.readers if self.linears[name].diagonal] for site in block.inputs()]
        groups = [names for names in groups if names]
        settled = [next((known[n + DIAGONAL] for n in names if n + DIAGONAL in known), None) for names in groups]
        missing = [names[0] for names, diagonal in zip(groups, settled, strict=True) if diagonal is None]
        energies = {}
        if missing:
            if self.original is None:
                raise PaleyError(f"{missing[0]}: a diagonal needs calibration text; set diagonal=false")
            linears = {name: self.adapter.module(name) for name in missing}
            sequences = -(-TOKENS // self.original.shape[1])
            energies = self._energies(block.module, block.index, linears, sequences)
        for names, diagonal in zip(groups, settled, strict=True):
            alike = [self.adapter.module(name) for name in names]
            plain = [linear.plain_weight() for linear in alike]
            if diagonal is None:
                strength = strength_for(self.linears[name] for name in names)
                diagonal = balance(energies[names[0]].sqrt(), torch.cat(plain), strength)
            for linear, weight in zip(alike, plain, strict=True):
                linear.scale_columns_(diagonal, weight)

    def _energies(
        self, module: nn.Module, index: int, linears: Mapping[str, QuantLinear], sequences: int,
        read: Callable[[QuantLinear, Tensor], Tensor] = lambda _, x: x,
    ) -> dict[str, Tensor]:  # fmt: skip
        """-> of some linears of a block, sums of squares of each channel, float64 [in].

        In the original, on so many sequences of the text; read(linear, x): what of its input counts.
        """
        assert self.original is not None
        found: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            energy = read(linears[name], x).square().sum(0, dtype=torch.float64)
            found[name] = found[name] + energy if name in found else energy

        for name, linear in linears.items():
            add(name, self.original.new_zeros(1, linear.plain_width))
        with capture_inputs(dict(linears), add):
            self.runner.run(module, index, self.original[:sequences])
        return found

    def _quantize_embedding(self, site: Site, q: Quantized | None) -> LayerReport:
        """Rows are rounded to nearest: what looks them up has no inputs to calibrate on."""
        embedding, scheme = self.adapter.embedding, self.linears[site.name]
        q, error = self._to_nearest(site, embedding.weight, q)
        stream = embedding.stream if isinstance(embedding, QuantEmbedding) else None
        made = QuantEmbedding.around(embedding, stream, scheme, q, name=site.name).float()
        self.adapter.model.set_submodule(site.module, made)
        if self.adapter.sites.tied:
            tie_head_(self.adapter.model, self.adapter.architecture, made)
        return LayerReport(site.name, error, q)

    def _to_nearest(self, site: Site, weight: Tensor, q: Quantized | None) -> tuple[Quantized, float]:
        """Of a weight that is not turned yet -> its codes, q if they are there, and their error."""
        scheme = self.linears[site.name]
        assert scheme.weight is not None
        if q is not None:
            return q, turned_error(weight, q, scheme.transform)
        return quantize_turned(weight, scheme.weight, scheme.transform, site.name)

    def _compared(
        self, block: Block, reference: nn.Module, inputs: Sequence[Site]
    ) -> AbstractContextManager[ComparedBlock | GatheredBlock | None]:
        if self.hidden is None or self.original is None:
            return nullcontext()
        if self.adapter.architecture.walked:
            return GatheredBlock(self.runner, block, reference, self.hidden, self.original, inputs, self.place)
        return ComparedBlock(
            self.runner, block, reference, self.hidden, self.original, inputs, self.compensate, self.place
        )

    def _alike(self, site: Site, known: Mapping[str, Quantized]) -> list[tuple[Site, ...]]:
        """The linears that read an input and wait for codes, those together that round it alike."""
        schemes = {self.adapter.sites[name]: self.linears[name] for name in site.readers if name not in known}
        how = {
            reader: (scheme.input, scheme.outliers, scheme.transform, scheme.diagonal)
            for reader, scheme in schemes.items()
            if scheme.weight is not None
        }
        return [tuple(reader for reader in how if how[reader] == alike) for alike in dict.fromkeys(how.values())]

    def _is_calibrated(self, alike: tuple[Site, ...]) -> bool:
        """Whether statistics of their common input are wanted; experts gather their own."""
        return any(self.linears[site.name].calibrated and not site.experts for site in alike)

    def _activate(self, block: Block) -> None:
        for path in block.attentions:
            self.adapter.module(path).kv_scheme = self.attentions.get(path)
        for site in block.linears():
            set_input_(self.adapter.module(site.module), self.linears[site.name])

    def _choose_outliers(self, block: Block, reference: nn.Module, known: Mapping[str, Quantized]) -> None:
        """Gives each linear without codes the columns of most energy, by what it reads in the original."""
        linears: dict[str, QuantLinear] = {}
        for site in block.linears():
            scheme = self.linears[site.name]
            if not scheme.outliers or site.name in known:
                continue
            linear = reference.get_submodule(block.local(site.module))
            assert isinstance(linear, QuantLinear)
            check_outliers(site.name, scheme.outliers, linear.in_features)
            if self.original is None:
                raise PaleyError(f"{site.name}: outliers need calibration text; set outliers=0")
            linears[site.name] = linear
        if not linears:
            return
        energies = self._energies(
            reference, block.index, linears, _OUTLIER_SEQUENCES, lambda linear, x: linear.round_input(x)
        )
        for name, energy in energies.items():
            columns = energy.topk(self.linears[name].outliers).indices.sort().values
            self.adapter.module(self.adapter.sites[name].module).outlier_columns = columns.int()

    def _codes(self, site: Site, statistics: InputStatistics | None) -> Quantized:
        linear, scheme = self.adapter.module(site.module), self.linears[site.name]
        assert isinstance(linear, Coded)
        assert scheme.weight is not None
        weight = linear.dequantize()
        if not scheme.calibrated:
            return quantize_turned(weight, scheme.weight, None, site.name)[0]
        check_range(weight, scheme.weight.grid, site.name)
        if statistics is None:
            raise PaleyError(
                f"{site.name}: its scheme needs calibration text, and none of the recipe's own does; set the recipe's "
                "weights.method=gptq, or this one's to nearest without outliers"
            )
        return quantize_gptq(
            weight, statistics, scheme.weight, outlier_columns=linear.outlier_columns,
            share=self.share, damp=statistics.damping, where=site.name,
        )  # fmt: skip

    def _expert_codes(self, block: Block, site: Site) -> Quantized:
        """GPTQ for each expert on the tokens that reach it; the others, `unreached`, are rounded to nearest."""
        stack, scheme = self.adapter.module(site.module), self.linears[site.name].weight
        assert isinstance(stack, QuantExperts)
        assert scheme is not None
        if self.hidden is None:
            raise PaleyError(f"{site.name}: its scheme needs calibration text; set weights.method=nearest")
        seen: dict[int, InputStatistics] = {}
        stack.observer = lambda expert, x: seen.setdefault(expert, InputStatistics()).add(x)
        try:
            self.runner.run(block.module, block.index, self.hidden)
        finally:
            stack.observer = None
        parts = []
        for expert in range(stack.experts):
            weight, where = stack.matrix(expert), f"{site.name}, expert {expert}"
            check_range(weight, scheme.grid, where)
            if expert in seen:
                found = seen[expert]
                parts.append(quantize_gptq(weight, found, scheme, share=0.0, damp=found.damping, where=where))
            else:
                self.unreached.setdefault(site.name, []).append(expert)
                parts.append(quantize_nearest(weight, scheme.without_data, where=where))
        return joined(parts)

    def _replace_linear(self, site: Site, q: Quantized) -> LayerReport:
        linear = self.adapter.module(site.module)
        if isinstance(linear, QuantExperts):
            made = QuantExperts.from_stack(linear, self.linears[site.name], q, name=site.name)
            put_(self.adapter.model, site.module, made)
            made.prepare_("packed")
            errors = tuple(rel_error(linear.matrix(e), made.matrix(e)) for e in range(made.experts))
            return LayerReport(site.name, _error(linear, made), q, errors)
        assert isinstance(linear, QuantLinear)
        made = QuantLinear.from_linear(linear, self.linears[site.name], q, name=site.name)
        made.shared_input = linear.shared_input
        made.prepare_(CALIBRATION if site.kind == "linear" and self.original is not None else "packed")
        self.adapter.model.set_submodule(site.module, made)
        report = LayerReport(site.name, _error(linear, made), q)
        linear.retire_()
        return report


def _error(linear: Any, made: Any) -> float:
    """||W - Ŵ||² / ||W||² of two weights [rows, width], some rows at a time."""
    few = max(1, _VALUES // made.width)
    parts = (slice(start, start + few) for start in range(0, made.rows, few))
    return rel_error_of((linear.dequantize(rows=part), made.dequantize(rows=part)) for part in parts)
