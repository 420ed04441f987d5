"""Tunes a quantized model on text that its weights were not calibrated on (`paley.model.tuning`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley import kernels
from paley.core.errors import PaleyError
from paley.core.memory import give_back
from paley.data import TokenBlocks
from paley.eval.reference import Reference
from paley.format.dtypes import cast_to_store
from paley.methods.tuning import rate_at
from paley.model.adapter import Adapter
from paley.model.problem import Problem
from paley.model.tuning import ACTIVATIONS, Tuner, activation_bytes
from paley.ops.matmul import bfloat16_linear
from paley.pipeline.monitor import Monitor
from paley.recipe import Tune

__all__ = ["original_head", "tune_"]


def tune_(
    problem: Problem, model: PreTrainedModel, blocks: TokenBlocks, settings: Tune, monitor: Monitor, device: str
) -> frozenset[str]:
    """Tunes the model's scales, gains and biases in place, one sequence a step; they end as they are stored.

    model: in float32, as it is after quantizing or loading. -> the names of the weights whose scales were tuned.
    """
    if stacks := sum(bool(site.experts) for site in problem.sites.of("linear")):
        monitor.note(
            f"{stacks} stacks of experts keep their scales: those of other weights, gains and biases are tuned"
        )
    monitor.stage("measuring the original on the text to tune on", 1)
    reference = Reference.of(problem.source.load(device=device), blocks).to(device)
    give_back(models=True)
    monitor.step()
    adapter = Adapter(model)
    steps, count = settings.epochs * len(blocks.ids), len(blocks.ids)
    monitor.stage("tuning", steps)
    fast = kernels.multiplies_bfloat16(torch.device(device))
    dtype = torch.bfloat16 if fast else torch.float32
    logits_of = original_head(reference)

    def wanted(hidden: Tensor) -> Tensor:
        return adapter.finish(logits_of(hidden))

    def keep(name: str, value: Tensor) -> Tensor:
        return cast_to_store(name, value, problem.dtype).to(value.dtype)

    generator = torch.Generator().manual_seed(settings.seed)
    held = activation_bytes(problem.sites, blocks.ids.shape[1])
    with Tuner(adapter, dtype=dtype, keep=keep, whole=held <= ACTIVATIONS) as tuner:
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(settings.epochs)])
        for step, at in enumerate(order.tolist()):
            ids, hidden = blocks.ids[at].to(device), reference.hidden[at].to(device)
            loss = tuner.step(ids, hidden, wanted, settings.rate * rate_at(step, steps))
            if not loss < float("inf"):
                raise PaleyError(
                    f"tuning: the KL is {loss} at step {step}, sequence {at}", remedy="use a smaller tune.rate"
                )
            monitor.step(f"KL {loss:.4f}")
    give_back()
    return tuner.tuned


def original_head(reference: Reference) -> Callable[[Tensor], Tensor]:
    """hidden [tokens, n] -> what the original's head makes of it, float32 [tokens, vocab]."""
    head, bias = reference.head.float(), None if reference.bias is None else reference.bias.float()
    return lambda hidden: bfloat16_linear(hidden, head, bias)
