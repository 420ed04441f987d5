"""Builds the modules of a quantized model, empty, from what its config.json says; and chooses their products once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.arch import Architecture, Site
from paley.core.errors import PaleyError, nearest_name
from paley.core.schemes import LinearScheme
from paley.core.transforms import Transform
from paley.format.spec import WEIGHT, QuantizationConfig
from paley.model.adapter import Adapter
from paley.model.attention import attach_schemes
from paley.model.embedding import QuantEmbedding, scale_of
from paley.model.experts import QuantExperts, use_experts_
from paley.model.fold import StreamBack
from paley.model.linear import QuantLinear
from paley.model.stacks import module_at, put_
from paley.model.walk import sites_of
from paley.ops.inputs import SharedInput

__all__ = ["build_", "prepare_", "share_input_", "share_inputs_", "tie_", "tie_head_"]


def build_(model: PreTrainedModel, spec: QuantizationConfig) -> None:
    """Puts packed layers, the embedding and the attentions' schemes into a model whose weights are still to come."""
    sites = sites_of(model)
    row = sites.architecture
    if spec.stream is not None:
        _turn_stream_(model, row, spec.stream)
    for name, scheme in spec.linears.items():
        if name not in sites or not sites[name].is_weight:
            hint = nearest_name(name, (site.name for site in sites.weights))
            raise PaleyError(f"config.json quantizes {name!r}, which is no linear layer of this model{hint}")
        layer, site = module_at(model, name), sites[name]
        if site.fixed and scheme != LinearScheme():
            raise PaleyError(f"config.json quantizes {name!r}, which cannot be: {site.fixed}; the config was changed")
        if site.kind == "embedding":
            if scheme != LinearScheme():
                _replace_embedding_(model, row, name, layer, scheme)
        elif scheme != LinearScheme() or (isinstance(layer, nn.Linear) and not site.fixed):
            _replace_linear_(model, site, layer, scheme)
    use_experts_(model)
    if spec.attentions:
        attach_schemes(model, spec.attentions)


def prepare_(model: PreTrainedModel, product: str, dtype: torch.dtype) -> None:
    """Chooses how each layer is multiplied, and lets layers that read one input round it once."""
    adapter = Adapter(model)
    tie_(adapter)
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantExperts):
            module.prepare_(product, dtype)
    share_inputs_(adapter)


def tie_(adapter: Adapter) -> None:
    """A tied head multiplies by the embedding's codes: loading, and moving to a device, leave it others."""
    if adapter.sites.tied and isinstance(adapter.head, QuantLinear):
        adapter.head.share_(adapter.embedding)


def _turn_stream_(model: PreTrainedModel, row: Architecture, stream: Transform) -> None:
    """The embedding turns what it looks up, the final norm turns it back: both keep the width of the original."""
    norm: Any = model.get_submodule(row.norm)
    head: Any = model.get_submodule(row.head)
    if stream.out_dim != model.config.hidden_size:
        raise PaleyError(
            f"quantization_config: stream ends at {stream.out_dim} values, hidden_size is {model.config.hidden_size}"
        )
    wide: Any = model.get_submodule(row.embedding)
    rows = wide.weight.new_empty(wide.weight.shape[0], stream.in_dim)
    turned = QuantEmbedding(
        len(rows), stream.in_dim, LinearScheme(), scale=row.scale_at(stream.in_dim), stream=stream, dtype=rows.dtype,
        device=rows.device, name=row.embedding,
    )  # fmt: skip
    model.set_submodule(row.embedding, turned)
    narrow = nn.Linear(stream.in_dim, len(rows), bias=head.bias is not None, device=rows.device, dtype=rows.dtype)
    assert turned.weight is not None
    narrow.weight = turned.weight
    model.set_submodule(row.head, narrow)
    norm.weight = nn.Parameter(norm.weight.new_empty(stream.in_dim), requires_grad=False)
    norm.register_forward_pre_hook(StreamBack(stream))


def _replace_linear_(model: PreTrainedModel, site: Site, linear: Any, scheme: LinearScheme) -> None:
    """Puts a QuantLinear in place of `linear`, the module at the site, on its device; QuantExperts, of a stack."""
    name = site.name
    if scheme.transform is not None and scheme.transform.in_dim != linear.in_features:
        raise PaleyError(
            f"{name}: transform.in_dim={scheme.transform.in_dim}, but the layer reads {linear.in_features}"
        )
    if scheme.weight is not None and f"{name}{WEIGHT}" in model.all_tied_weights_keys:
        raise PaleyError(f"{name}: its weight is tied to another; set tie_word_embeddings to false in config.json")
    width, kind, device = scheme.stored_width(linear.in_features), linear.weight.dtype, linear.weight.device
    made: QuantExperts | QuantLinear
    if site.experts:
        made = QuantExperts(site.experts, linear.out_features, width, scheme, dtype=kind, device=device, name=name)
    else:
        made = QuantLinear(
            width,
            linear.out_features,
            bias=linear.bias is not None,
            scheme=scheme,
            dtype=kind,
            device=device,
            name=name,
        )
    put_(model, name, made)


def _replace_embedding_(
    model: PreTrainedModel, row: Architecture, name: str, embedding: Any, scheme: LinearScheme
) -> None:
    """A coded embedding; a head that is tied to it multiplies by the very same codes."""
    vocabulary, width = embedding.weight.shape
    if name != row.embedding:
        raise PaleyError(f"config.json quantizes {name!r}, which is not the model's word embedding; remove the entry")
    if scheme.transform is not None and (scheme.weight is None or scheme.transform.in_dim != width):
        what = "but its rows are unquantized" if scheme.weight is None else f"but rows have {width} values"
        raise PaleyError(f"{name}: transform.in_dim={scheme.transform.in_dim}, {what}; the config was changed")
    made = QuantEmbedding(
        vocabulary, scheme.stored_width(width), scheme, scale=scale_of(embedding),
        stream=getattr(embedding, "stream", None),
        dtype=embedding.weight.dtype, device=embedding.weight.device, name=name,
    )  # fmt: skip
    model.set_submodule(name, made)
    if model.all_tied_weights_keys.pop(f"{row.head}{WEIGHT}", None) is None:
        return
    tie_head_(model, row, made)


def tie_head_(model: PreTrainedModel, row: Architecture, embedding: QuantEmbedding) -> None:
    """Puts a head in place that multiplies by the very codes of the embedding."""
    head: Any = model.get_submodule(row.head)
    made = QuantLinear(
        embedding.width, embedding.rows, bias=head.bias is not None, scheme=embedding.scheme, dtype=embedding.dtype,
        device="meta", name=row.head,
    )  # fmt: skip
    made.bias = head.bias
    model.set_submodule(row.head, made.share_(embedding))


def _equal(a: Tensor | None, b: Tensor) -> bool:
    """Whether both are known to be equal: what is offloaded, or elsewhere, equals itself alone."""
    if a is None or a is b or a.device != b.device or a.is_meta:
        return a is b
    return torch.equal(a, b)


def share_inputs_(adapter: Adapter, block: int | None = None) -> None:
    """Linears, of one block or of all, that read one input transform and round it once."""
    for site in adapter.sites.of("input", block=block):
        readers = [adapter.module(path) for path in site.readers]
        if len(readers) < 2 or not all(isinstance(reader, QuantLinear) for reader in readers):
            continue
        share_input_(readers)


def share_input_(readers: list[QuantLinear]) -> None:
    """These linears read one input, one after the other."""
    shared = SharedInput(len(readers))
    diagonals = [reader.diagonal for reader in readers]
    for reader in readers:
        reader.shared_input = shared
        if reader.diagonal is not None:
            reader.diagonal_key = next(i for i, d in enumerate(diagonals) if _equal(d, reader.diagonal))
