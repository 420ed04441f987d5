"""Writes the quantized checkpoint folder, and proves that reading it back gives the model that was in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from paley import hf
from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence
from paley.format import spec
from paley.format.digests import seal_model
from paley.format.files import copy_companions, write_json
from paley.format.rope import with_older_keys
from paley.format.writer import ShardWriter
from paley.model.adapter import Adapter
from paley.model.coded import Coded
from paley.model.keys import MEAN_KEYS
from paley.model.problem import Problem
from paley.ops.matmul import EXACT

__all__ = ["finish_checkpoint", "load_stored", "sample_logits", "save_checkpoint", "verify"]

SAMPLE = 64  # tokens that a saved model is verified on


def save_checkpoint(folder: Path, model: PreTrainedModel, problem: Problem) -> None:
    """Weights, config.json and tokenizer files into an empty folder; unquantized floats in their type."""
    writer = ShardWriter(folder)
    packed = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, Coded)
        for buffer, _ in module.named_buffers()
    }
    head = problem.sites.head
    tied = f"{head.name}." if head.stored_as != head.name else None
    for name, tensor in model.state_dict().items():
        if tied is not None and name.startswith(tied) and name != f"{head.name}.bias":
            continue
        if name.rpartition(".")[2] in MEAN_KEYS:
            writer.add(name, tensor.half())
        else:
            writer.add(name, tensor if name in packed else tensor.to(problem.dtype))
    for name, info in problem.carried.items():
        writer.add(name, info.read(), own=True)
    writer.close()
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


@torch.no_grad()
def sample_logits(model: PreTrainedModel) -> Tensor:
    """Logits [tokens, vocab] of random tokens, always the same, on the CPU: the model's fingerprint in numbers."""
    vocabulary = Adapter(model).sites.embedding.shape[0]
    ids = torch.randint(vocabulary, (1, SAMPLE), generator=torch.Generator().manual_seed(0))
    return model(ids.to(model.device), use_cache=False).logits[0].float().cpu()


def verify(folder: Path, problem: Problem, expected: Tensor, device: str) -> PreTrainedModel:
    """Loads the folder -> the model; raises unless its `sample_logits` have a KL divergence of exactly 0 to those.

    expected: of a model that decodes a weight whenever it is used.
    """
    model = load_stored(folder, problem, device, product="packed")
    divergence = float(kl_divergence(expected, sample_logits(model)).abs().max())
    if divergence != 0.0:
        raise PaleyError(
            f"{folder}: the saved model differs from the one in memory (KL {divergence:.3g}, must be 0); "
            "nothing was published; please report this"
        )
    return model


def load_stored(folder: Path, problem: Problem, device: str, product: str = EXACT) -> PreTrainedModel:
    """The model that was written to the folder; product: as of `hf.load`."""
    if problem.quantizes:
        return hf.load(folder, device=device, product=product)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.to(device)  # type: ignore[arg-type]
