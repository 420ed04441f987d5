"""Loads a model, the original or a quantized one, so that one of its blocks at a time is in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from paley import hf
from paley.format.checkpoint import Checkpoint
from paley.format.config import QuantizationConfig
from paley.format.spec import expected_tensors
from paley.model.adapter import Adapter, Block
from paley.model.coded import Coded
from paley.model.experts import QuantExperts
from paley.model.linear import QuantLinear
from paley.model.loading import Source, empty_model, filled, without_values
from paley.model.pages import Pages, Turns, empty_, put_tensor_
from paley.model.reading import build_, share_inputs_, tie_
from paley.model.walk import sites_of

__all__ = ["page_original", "page_quantized"]


def page_original(source: Source) -> tuple[PreTrainedModel, Turns]:
    """-> (the original in float32, what runs jobs with it)."""
    model = source.load(blocks=False)
    return model, source.pages(Adapter(model)).in_turn


def page_quantized(folder: Path, product: str) -> tuple[PreTrainedModel, Turns]:
    """-> (the model of a folder that Paley has written, what runs jobs with it); product: as of `hf.load`.

    Errors: PaleyError for what `hf.load` refuses: tensors that config.json does not describe, or that are damaged.
    """
    hf.check_digests(folder)
    checkpoint = Checkpoint.open(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    section = vars(config).pop("quantization_config", None)
    skeleton = empty_model(config)
    sites = sites_of(skeleton)
    names = {
        name: tensor for name, tensor in skeleton.state_dict().items() if name != sites.head.tensor or not sites.tied
    }
    model, _ = filled(skeleton, config, without_values(names, torch.float32), torch.float32)
    model.eval()
    empty_(model)
    carried: tuple[str, ...] = ()
    if section is not None:
        spec = QuantizationConfig.from_dict(section)
        carried = spec.carried
        build_(model, spec)
    infos = hf.check_files(model, sorted({str(info.file) for info in checkpoint.infos.values()}), carried)
    exact = {
        name
        for path, module in model.named_modules()
        if isinstance(module, Coded)
        for name in expected_tensors(path, module.scheme, module.width, module.rows)
        if not name.endswith(".weight")
    }

    def read(name: str, _: Tensor) -> Tensor:
        tensor = infos[name].read()
        return tensor if name in exact or not tensor.is_floating_point() else tensor.float()

    adapter = Adapter(model)
    stack = f"{adapter.architecture.blocks}."
    for name, tensor in model.state_dict().items():
        if not name.startswith(stack) and name in infos:
            put_tensor_(model, name, read(name, tensor))
    tie_(adapter)
    if adapter.sites.tied and isinstance(adapter.head, nn.Linear):
        adapter.head.weight = adapter.embedding.weight
    hf.check_stored(model, infos)
    if isinstance(adapter.head, QuantLinear):
        adapter.head.prepare_(product)

    def ready(block: Block) -> None:
        for module in block.module.modules():
            if isinstance(module, QuantLinear | QuantExperts):
                module.prepare_(product)
        share_inputs_(adapter, block.index)

    model.requires_grad_(False)
    return model, Pages(adapter, read, ready).in_turn
