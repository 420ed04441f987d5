"""Writes the quantized checkpoint folder, and proves that reading it back gives the model that was in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from paley import hf
from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence
from paley.format import spec
from paley.format.checkpoint import read_tensors
from paley.format.digests import seal_model
from paley.format.files import copy_companions, write_json
from paley.format.rope import with_older_keys
from paley.format.writer import ShardWriter
from paley.kernels.floats import quickly
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.coded import Coded
from paley.model.key_statistics import BALANCE
from paley.model.keys import MEAN_KEYS
from paley.model.loading import context_of
from paley.model.pages import Turns, one_after_another
from paley.model.problem import Problem
from paley.ops.matmul import EXACT
from paley.pipeline.paged import page_quantized

__all__ = [
    "Stored", "finish_checkpoint", "load_stored", "sample_ids", "sample_logits", "sampled_logits", "save_checkpoint",
    "stored_tensors", "verify",
]  # fmt: skip

SAMPLE = 64  # tokens that a saved model is verified on


def stored_tensors(
    module: nn.Module, prefix: str, problem: Problem, *, without: str | tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """What a checkpoint holds of a quantized model, or of a part of it, whose names there begin with `prefix`.

    without: beginnings of names of the module that are left out.
    """
    packed = {
        f"{name}.{buffer}".removeprefix(".")
        for name, part in module.named_modules()
        if isinstance(part, Coded)
        for buffer, _ in part.named_buffers()
    }
    found = {}
    for name, tensor in module.state_dict().items():
        if name.startswith(without):
            continue
        if name.rpartition(".")[2] in MEAN_KEYS:
            tensor = tensor.half()
        elif name not in packed:
            tensor = tensor.to(problem.dtype)
        found[prefix + name] = tensor
    return found


def save_checkpoint(
    folder: Path, model: PreTrainedModel, problem: Problem, blocks: Iterable[Path] | None = None
) -> None:
    """Weights, config.json and tokenizer files into an empty folder; unquantized floats in their type.

    blocks: files that hold the model's blocks, in order; of the model itself only the rest is taken then.
    """
    head, stack = problem.sites.head, f"{problem.sites.architecture.blocks}."
    tied = f"{head.name}." if head.stored_as != head.name else None
    with ShardWriter(folder) as writer:
        for name, tensor in stored_tensors(model, "", problem, without=() if blocks is None else stack).items():
            if tied is not None and name.startswith(tied) and name != f"{head.name}.bias":
                continue
            writer.add(name, tensor)
        for file in blocks or ():
            for name, tensor in read_tensors(file).items():
                if not name.endswith(BALANCE):
                    writer.add(name, tensor, own=True)
        for name, info in problem.carried.items():
            writer.add(name, info.read(), own=True)
    finish_checkpoint(folder, model, problem)


def finish_checkpoint(folder: Path, model: PreTrainedModel, problem: Problem) -> None:
    """Puts config.json and the source's tokenizer files beside the weights; model may be a skeleton."""
    write_json(folder / "config.json", _config(model, problem))
    copy_companions(problem.source.path, folder)
    seal_model(folder)


def _config(model: PreTrainedModel, problem: Problem) -> dict[str, Any]:
    """The config.json of the quantized model; an ordinary one if nothing is quantized."""
    config = with_older_keys(json.loads(model.config.to_json_string(use_diff=False)))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(problem.dtype).removeprefix("torch.")
    if problem.quantizes:
        config["quantization_config"] = spec.QuantizationConfig(
            linears=problem.schemes.linears, attentions=problem.schemes.attentions, stream=problem.stream,
            carried=tuple(problem.carried),
        ).to_dict()  # fmt: skip
    row = problem.sites.architecture
    if row.ragged and config["hidden_size"] % config["num_attention_heads"]:
        config |= row.ragged
    return config


def sample_ids(adapter: Adapter) -> Tensor:
    """[1, SAMPLE] random tokens, always the same; fewer if the model reads no more.

    Types that count positions from behind the padding's id, as RoBERTa does, read a few less than their config says.
    """
    vocabulary, context = adapter.sites.embedding.shape[0], context_of(adapter.model.config) or 2 * SAMPLE
    size = min(SAMPLE, max(1, 3 * context // 4))
    ids = torch.randint(vocabulary, (1, size), generator=torch.Generator().manual_seed(0))
    return ids.to(adapter.device)


@torch.no_grad()
def sampled_logits(runner: BlockRunner, hidden: Tensor) -> Tensor:
    """What the last block has made of `sample_ids` -> `sample_logits`."""
    runner.adapter.norm.float()
    runner.adapter.head.float()
    return runner.logits(hidden)[0].float().cpu()


@torch.no_grad()
@quickly
def sample_logits(model: PreTrainedModel) -> Tensor:
    """Logits [tokens, vocab] of `sample_ids`, on the CPU: the model's fingerprint in numbers."""
    return model(sample_ids(Adapter(model)), use_cache=False).logits[0].float().cpu()


@dataclass(frozen=True)
class Stored:
    """A model that was read back, and how jobs run with it: one after the other, or block by block if it is paged."""

    model: PreTrainedModel
    turns: Turns = one_after_another


def verify(folder: Path, problem: Problem, expected: Tensor, device: str, *, paged: bool) -> Stored:
    """Loads the folder; raises unless the model's `sample_logits` have a KL divergence of exactly 0 to those.

    expected: of a model that decodes a weight whenever it is used. paged: one block at a time is in memory.
    """
    stored = load_stored(folder, problem, device, product="packed", paged=paged)
    (found,) = stored.turns([lambda: sample_logits(stored.model)])
    divergence = float(kl_divergence(expected, found).abs().max())
    if divergence != 0.0:
        raise PaleyError(
            f"{folder}: the saved model differs from the one in memory (KL {divergence:.3g}, must be 0); "
            "nothing was published; please report this"
        )
    return stored


def load_stored(folder: Path, problem: Problem, device: str, product: str = EXACT, *, paged: bool = False) -> Stored:
    """The model that was written to the folder; product: as of `hf.load`; paged: as of `verify`."""
    if paged:
        return Stored(*page_quantized(folder, product))
    if problem.quantizes:
        return Stored(hf.load(folder, device=device, product=product))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return Stored(model.to(device))  # type: ignore[arg-type]
