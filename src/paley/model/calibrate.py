"""Quantizes a model's weights block by block, each block calibrated on what the quantized ones before it give.

Beside the block at work a copy of the original runs, on the original's inputs, so that GPTQ can aim at the
original outputs. Memory beside the model: that copy, the hidden states of the calibration tokens twice, and the packed
codes of the blocks that are done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError
from paley.core.metrics import rel_error
from paley.core.rounding import Quantized
from paley.core.schemes import AttentionSlot, LinearSlot
from paley.format.spec import check_outliers
from paley.methods.gptq import InputStatistics, quantize_gptq
from paley.methods.nearest import quantize_nearest
from paley.model.adapter import RESIDUAL_WRITERS, SHARED_INPUTS, Adapter, Block
from paley.model.attention import attach_slots
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.inputs import SharedInput
from paley.model.linear import QuantLinear

__all__ = ["BlockQuantizer", "LayerReport", "set_attention_", "set_input_", "wrap_"]


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear: ||W - Ŵ||² / ||W||² against the rotated weight, and its codes.

    quantized is None once the codes are packed into the layer and written away.
    """

    name: str
    rel_error: float
    quantized: Quantized | None


def wrap_(adapter: Adapter, linears: dict[str, LinearSlot], attentions: dict[str, AttentionSlot]) -> None:
    """Puts a QuantLinear with its run-time transform in place of every linear; nothing is rounded yet."""
    attach_slots(adapter.model, attentions)
    for block in adapter.blocks:
        set_attention_(block, None)
        for _, roles in SHARED_INPUTS:
            shared = SharedInput()
            for role in roles:
                path = block.path(role)
                linear, slot = block.part(role), linears[path]
                if not isinstance(linear, nn.Linear):
                    raise PaleyError(f"{path}: is a {type(linear).__name__}, expected a linear layer")
                made = QuantLinear.from_linear(linear, LinearSlot(transform=slot.transform), None, name=path)
                made.shared_input = shared if len(roles) > 1 else None
                adapter.model.set_submodule(path, made)


def set_input_(linear: nn.Module, slot: LinearSlot | None) -> None:
    """Makes a linear round its input as `slot` says, or not at all; its weight and transform stay."""
    assert isinstance(linear, QuantLinear)
    linear.slot = replace(linear.slot, input=None if slot is None else slot.input)


def set_attention_(block: Block, slot: AttentionSlot | None) -> None:
    block.part("attention").kv_slot = slot  # type: ignore[assignment]


class BlockQuantizer:
    """Walks the blocks in order; `quantize(i)` or, where a block's codes exist already, `restore(i, ...)`.

    ids [sequences, seq_len]: the calibration tokens; None where no weight needs any. compensate: as in Recipe.
    """

    def __init__(
        self,
        runner: BlockRunner,
        ids: Tensor | None,
        linears: dict[str, LinearSlot],
        attentions: dict[str, AttentionSlot],
        *,
        compensate: str,
    ):
        self.runner, self.linears, self.attentions, self.compensate = runner, linears, attentions, compensate
        self.hidden = runner.embed(ids) if ids is not None else None
        self.original = self.hidden.clone() if self.hidden is not None else None

    @torch.no_grad()
    def quantize(self, index: int, on_layer: Callable[[LayerReport], None] = lambda _: None) -> list[LayerReport]:
        """Quantizes block `index` in place -> a report for each of its quantized linears."""
        block = self.runner.adapter.blocks[index]
        reference = copy.deepcopy(block.module)
        self._center_keys(block)
        self._choose_outliers(block, reference)
        self._activate(block)
        reports = []
        for roles in self._same_inputs(block):
            calibrated = any(self.linears[block.path(role)].needs_data for role in roles) and self.hidden is not None
            statistics = self._statistics(block, reference, roles[0]) if calibrated else None
            for role in roles:
                report = self._quantize_linear(block.path(role), statistics)
                on_layer(report)
                reports.append(report)
        self._advance(index, reference)
        return reports

    @torch.no_grad()
    def restore(
        self,
        index: int,
        quantized: dict[str, Quantized],
        key_mean: Tensor | None = None,
        on_layer: Callable[[LayerReport], None] = lambda _: None,
    ) -> list[LayerReport]:
        """Puts known codes into block `index` and moves on to the next: the same outcome as `quantize`."""
        block = self.runner.adapter.blocks[index]
        reference = copy.deepcopy(block.module)
        if key_mean is not None:
            block.part("attention").key_mean.copy_(key_mean)
        self._activate(block)
        reports = [self._replace(path, q) for path, q in quantized.items()]
        for report in reports:
            on_layer(report)
        self._advance(index, reference)
        return reports

    def _same_inputs(self, block: Block) -> Iterator[tuple[str, ...]]:
        """Roles whose weights are quantized, grouped by what they read: the same tensor, rounded alike."""
        for _, roles in SHARED_INPUTS:
            slots = {role: self.linears[block.path(role)] for role in roles}
            rounded = {role: (slot.input, slot.outliers) for role, slot in slots.items() if slot.weight is not None}
            for alike in dict.fromkeys(rounded.values()):
                yield tuple(role for role, how in rounded.items() if how == alike)

    def _activate(self, block: Block) -> None:
        set_attention_(block, self.attentions.get(block.path("attention")))
        for role, path in block.linears():
            set_input_(block.part(role), self.linears[path])

    def _center_keys(self, block: Block) -> None:
        """Sets the block's mean keys, from the original's: the part that every query sees alike."""
        attention, slot = block.part("attention"), self.attentions.get(block.path("attention"))
        if slot is None or slot.keys is None or not slot.center_keys:
            return
        if self.original is None:
            raise PaleyError(f"{block.path('attention')}: center_keys needs calibration text; set center_keys=false")
        sums: list[Tensor] = []
        attention.key_observer = lambda keys: sums.append(keys.double().sum((0, 2)))
        try:
            sample = self.original[: 4 * self.runner.batch]  # a mean needs few tokens
            for hidden in sample.split(self.runner.batch):
                self.runner.until(block.part("o"), block.module, block.index, hidden)
        finally:
            attention.key_observer = None
        mean = torch.stack(sums).sum(0) / (sample.shape[0] * sample.shape[1])
        attention.key_mean.copy_(mean.half())  # as it is stored

    def _choose_outliers(self, block: Block, reference: nn.Module) -> None:
        """Gives each linear the columns of most energy of its slot's number, by what it reads in the original."""
        for role, path in block.linears():
            slot, linear = self.linears[path], reference.get_submodule(getattr(block.architecture, role))
            if not slot.outliers:
                continue
            assert isinstance(linear, QuantLinear)
            check_outliers(path, slot.outliers, linear.in_features)
            if self.original is None:
                raise PaleyError(f"{path}: outliers need calibration text; set outliers=0")
            energy = torch.zeros(linear.in_features, dtype=torch.float64, device=self.original.device)

            def add(_: str, x: Tensor, linear: QuantLinear = linear, energy: Tensor = energy) -> None:
                energy.add_(linear.round_input(x).double().square().sum(0))

            with capture_inputs({"input": linear}, add):
                for hidden in self.original[: 4 * self.runner.batch].split(self.runner.batch):
                    self.runner.until(linear, reference, block.index, hidden)
            columns = energy.topk(slot.outliers).indices.sort().values
            block.part(role).outlier_columns = columns.int()  # type: ignore[assignment]

    def _advance(self, index: int, reference: nn.Module) -> None:
        if self.hidden is not None and self.original is not None:
            self.original = self.runner.run(reference, index, self.original, out=self.original)
            self.hidden = self.runner.block(index, self.hidden, out=self.hidden)

    def _statistics(self, block: Block, reference: nn.Module, role: str) -> InputStatistics:
        """Second moments of what the linear `role` of the block reads, against the same place of the original."""
        assert self.hidden is not None
        assert self.original is not None
        norm = RESIDUAL_WRITERS.get(role) if self.compensate == "residual_stream" else None
        statistics = InputStatistics()

        def run(module: nn.Module, hidden: Tensor) -> tuple[QuantLinear, Tensor, Tensor | None]:
            linear, seen = module.get_submodule(getattr(block.architecture, role)), {}
            assert isinstance(linear, QuantLinear)
            watched: dict[str, nn.Module] = {"input": linear}
            if norm is not None:
                watched["stream"] = module.get_submodule(getattr(block.architecture, norm))
            with capture_inputs(watched, seen.__setitem__):
                self.runner.until(linear, module, block.index, hidden)
            return linear, linear.round_input(seen["input"]), seen.get("stream")

        batches = zip(*(h.split(self.runner.batch) for h in (self.hidden, self.original)), strict=True)
        for hidden, original in batches:
            _, x, stream = run(block.module, hidden)
            linear, x_original, stream_original = run(reference, original)
            if stream is None or stream_original is None:
                statistics.add(x, x_original)
                continue
            # The next norm divides each token by its size: an error counts relative to it. Without this the few
            # tokens with massive activations would decide everything.
            after = stream_original + nn.functional.linear(x_original, linear.dequantize(), linear.bias)
            weight = after.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            statistics.add(x * weight, x_original * weight, (stream_original - stream) * weight)
        return statistics

    def _quantize_linear(self, path: str, statistics: InputStatistics | None) -> LayerReport:
        linear, scheme = self.runner.adapter.model.get_submodule(path), self.linears[path].weight
        assert isinstance(linear, QuantLinear)
        assert scheme is not None
        weight = linear.dequantize()
        if not self.linears[path].needs_data:
            q = quantize_nearest(weight, scheme, where=path)
        else:
            if statistics is None:
                raise PaleyError(
                    f"{path}: its scheme needs calibration text, and none of the recipe's own does; set the recipe's "
                    "weights.method=gptq, or this one's to nearest without outliers"
                )
            q = quantize_gptq(
                weight, statistics, scheme,
                outlier_columns=linear.outlier_columns, compensate=self.compensate != "plain", where=path,
            )  # fmt: skip
        return self._replace(path, q)

    def _replace(self, path: str, q: Quantized) -> LayerReport:
        linear = self.runner.adapter.model.get_submodule(path)
        assert isinstance(linear, QuantLinear)
        made = QuantLinear.from_linear(linear, self.linears[path], q, name=path)
        made.shared_input = linear.shared_input
        made.materialize_()
        self.runner.adapter.model.set_submodule(path, made)
        return LayerReport(path, rel_error(linear.dequantize(), made.dequantize()), q)
