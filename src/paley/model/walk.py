"""The sites of a model: by the row of its family, or, without one, by walking its modules.

A walk knows nothing of the wiring. Blocks are the longest-lived list of modules: as many as the config has layers.
Linears are what blocks hold, each with an input of its own; keys and values are those of attentions that let Paley's
take their place, and that read from the cache what they wrote into it. Nothing can be folded then, and nothing widened.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from transformers.pytorch_utils import Conv1D

from paley.arch import FAMILIES, Architecture, Site, Sites, head_input, sites
from paley.core.errors import PaleyError

__all__ = [
    "HYBRID_LAYERS", "PLAIN_LAYERS", "has_own_cache", "head_widths", "is_attention", "is_experts", "sites_of",
    "stacks_of",
]  # fmt: skip

_FOUND = "paley_sites"  # the attribute of a model that was walked: its modules are replaced afterwards
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # of a cache, of keys and values alone
HYBRID_LAYERS = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)  # and states
# An attention function is handed what the cache returned. Latent attention expands it first.
_READS_CACHE = re.compile(r"\bkey\w*, value\w* = (?:self\.)?\w+\.update\(\s*key\w*, value\w*,")
_CROSS = re.compile(r"cross|encoder_attn|encoder_decoder", re.IGNORECASE)
_WAY_OUT = "write a row for it (docs/adding-a-model.md)"


def sites_of(model: PreTrainedModel) -> Sites:
    """Every place of a model where a tensor can be quantized, as it was before anything was replaced in it.

    Errors: PaleyError for a model without a row whose blocks, embedding or head cannot be found.
    """
    if (row := FAMILIES.get(model.config.model_type)) is not None:
        return sites(row, model.config)
    if (found := vars(model).get(_FOUND)) is None:
        found = vars(model)[_FOUND] = _walked(model)
    return found


def is_attention(module: nn.Module) -> bool:
    """What transformers' attention modules have in common: a place in the cache and a causality."""
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as stacks, and computes them by a function that transformers lets be replaced."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def stacks_of(experts: Any) -> tuple[str, str]:
    """Names of the two stacks [E, out, in] of such a module."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def head_widths(attention: Any) -> tuple[int, int] | None:
    """Values of a head of keys and of values; None if the module does not say."""
    names = ("qk_head_dim", "head_dim", "head_size")
    keys = next((width for name in names if (width := getattr(attention, name, None))), None)
    values = getattr(attention, "v_head_dim", None) or keys
    return None if keys is None or values is None else (int(keys), int(values))


def has_own_cache(model: PreTrainedModel) -> bool:
    """Whether the family defines a cache of its own, which no other can take the place of."""
    home = inspect.getmodule(type(model))
    kinds = [kind for kind in vars(home).values() if isinstance(kind, type) and issubclass(kind, Cache)]
    return any(kind.__module__ == type(model).__module__ for kind in kinds)


def _walked(model: PreTrainedModel) -> Sites:
    kind, config = model.config.model_type, model.config.get_text_config(decoder=True)
    embedding, head = _outer(model)
    lists = _block_lists(model, config)
    paths = {id(module): name for name, module in model.named_modules()}
    tied = _tied(model, paths[id(embedding)], paths[id(head)])
    row = Architecture(
        block=(), family=kind, embedding=paths[id(embedding)], head=paths[id(head)], blocks=lists[0], norm="", rotary=""
    )
    kept: dict[str, str] = {}
    found = list(_sites(model, config, row, lists, embedding, head, tied=tied, kept=kept))
    return Sites(row, iter(found), tied=tied, kept=kept)


def _outer(model: PreTrainedModel) -> tuple[Any, Any]:
    """The word embedding and the head."""
    kind = model.config.model_type
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError) as error:
        raise PaleyError(
            f"architecture {kind!r}: transformers names no word embedding of it", remedy=_WAY_OUT
        ) from error
    for what, module in (("word embedding", embedding), ("head", head)):
        if not isinstance(module, nn.Module) or getattr(module, "weight", None) is None:
            raise PaleyError(f"architecture {kind!r}: transformers names no {what} of it", remedy=_WAY_OUT)
    return embedding, head


def _tied(model: PreTrainedModel, embedding: str, head: str) -> bool:
    """As the config has it: the weights themselves are tied only once a model is loaded."""
    names = {f"{embedding}.weight", f"{head}.weight"}
    return any({one, other} == names for one, other in model.all_tied_weights_keys.items())


def _block_lists(model: PreTrainedModel, config: Any) -> list[str]:
    """Paths of the lists of modules that make up the blocks, the one with most values first."""
    layers = getattr(config, "num_hidden_layers", None)
    counts = {layers, getattr(config, "num_layers", layers)}  # LongCat's blocks hold two layers each
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in lists):
            lists[name] = module
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    fitting = [name for name in lists if layers is None or len(lists[name]) in counts]
    if not fitting or not sizes[max(fitting, key=sizes.__getitem__)]:
        seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise PaleyError(
            f"architecture {model.config.model_type!r}: its {layers} decoder blocks cannot be found; lists of modules "
            f"in it: {seen}",
            remedy=_WAY_OUT,
        )
    first = max(fitting, key=sizes.__getitem__)
    return [first, *(n for n in fitting if n != first and len(lists[n]) == len(lists[first]))]


def _sites(
    model: PreTrainedModel, config: Any, row: Architecture, lists: list[str], embedding: Any, head: Any,
    *, tied: bool, kept: dict[str, str],
) -> Iterator[Site]:  # fmt: skip
    fixed = _why_read(model, row.embedding)
    if not _is_plain_embedding(embedding):
        fixed = f"its rows are looked up by {type(embedding).__name__}"
    head_fixed = _why_read(model, row.head) or ("" if tied or _multiplies(head) else f"is a {type(head).__name__}")
    if tied:
        fixed = head_fixed = fixed or head_fixed
    yield Site(
        row.embedding, "embedding", tuple(embedding.weight.shape), None, row.embedding, stored_as=row.embedding,
        fixed=fixed,
    )  # fmt: skip
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    shared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for index in range(len(model.get_submodule(lists[0]))):  # type: ignore[arg-type]
        for path in lists:
            for name, module in model.get_submodule(f"{path}.{index}").named_modules(prefix=f"{path}.{index}"):
                if places[id(module)] > 1 and (is_attention(module) or not any(True for _ in module.children())):
                    if isinstance(module, nn.Linear | Conv1D):
                        kept[name] = "is used at several places"
                    continue
                yield from _of_module(model, config, name, module, index, shared, kept)
    width = head.weight.shape[1]
    yield head_input(row, width)
    yield Site(
        row.head, "head", tuple(head.weight.shape), None, row.head, reads=head_input(row, width).name,
        stored_as=row.embedding if tied else row.head, fixed=head_fixed,
    )  # fmt: skip


def _of_module(
    model: PreTrainedModel, config: Any, name: str, module: Any, index: int, shared: set[str], kept: dict[str, str]
) -> Iterator[Site]:
    if is_experts(module):
        yield from _expert_sites(name, module, index, kept)
    elif isinstance(module, nn.Linear | Conv1D):
        if why := _why_kept(model, name, module, shared):
            kept[name] = why
            return
        transposed = isinstance(module, Conv1D)
        shape = tuple(module.weight.T.shape if transposed else module.weight.shape)
        yield from _linear(name, f"{name}.weight", shape, index, transposed=transposed)
    elif is_attention(module) and not _CROSS.search(name) and not has_own_cache(model):
        yield from _cache(config, name, module, index)


def _linear(name: str, tensor: str, shape: tuple[int, ...], index: int, **more: Any) -> Iterator[Site]:
    read = f"{name}.input"
    yield Site(read, "input", (shape[1],), index, "", readers=(name,))
    yield Site(name, "linear", shape, index, name, reads=read, stored_as=name, tensor=tensor, **more)


def _expert_sites(name: str, experts: Any, index: int, kept: dict[str, str]) -> Iterator[Site]:
    for part in stacks_of(experts):
        stack = getattr(experts, part, None)
        if not isinstance(stack, nn.Parameter) or stack.dim() != 3:
            kept[f"{name}.{part}"] = "is no stack of matrices"
            continue
        count, rows, columns = stack.mT.shape if experts.is_transposed else stack.shape
        path = f"{name}.{part}"
        yield from _linear(path, path, (count * rows, columns), index, experts=count, transposed=experts.is_transposed)


def _cache(config: Any, name: str, module: Any, index: int) -> Iterator[Site]:
    widths, place = head_widths(module), module.layer_idx
    layers = _cache_layers(config)
    known = 0 <= place < len(layers) and type(layers[place]) in (*PLAIN_LAYERS, *HYBRID_LAYERS)
    if widths is None or not known or getattr(config, "num_kv_shared_layers", 0) or not _hands_on(module):
        return
    looks_back = getattr(layers[place], "sliding_window", None)
    latent = getattr(module, "qk_head_dim", None) is not None  # each head has keys of its own
    heads = None if latent else getattr(config, "num_key_value_heads", None)
    heads = heads or getattr(config, "num_attention_heads", 1)
    for kind, width in zip(("keys", "values"), widths, strict=True):
        yield Site(f"{name}.{kind}", kind, (heads, width), index, name, window=looks_back)


def _cache_layers(config: Any) -> list[Any]:
    """What transformers holds the keys and values of each layer in."""
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):  # a config that says nothing of layers
        return []


def _hands_on(module: nn.Module) -> bool:
    """Whether the module's forward gives what the cache returned to an attention function of transformers' table.

    Sinks of single tokens are given as `sinks`, which no such function knows; those of heads as `s_aux`.
    """
    text = _source(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in text and "sinks=sinks" not in text and _READS_CACHE.search(text) is not None


@cache
def _source(of: Any) -> str:
    """The text of a class or function; '' if Python does not have it."""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""


def _why_kept(model: PreTrainedModel, name: str, module: Any, shared: set[str]) -> str:
    """Why a linear cannot be quantized, or must not; '' if it can."""
    if f"{name}.weight" in shared:
        return "shares its weight with another"
    if not _is(module, Conv1D) and not _multiplies(module):
        return f"is a {type(module).__name__}"
    if module.weight.dim() != 2 or 0 in module.weight.shape:
        return "is no matrix"
    if why := _why_read(model, name):
        return why
    parent = model.get_submodule(name.rpartition(".")[0])
    counts = {getattr(model.config.get_text_config(decoder=True), key, None) for key in _EXPERT_COUNTS}
    if hasattr(parent, "experts") and isinstance(module, nn.Linear) and module.out_features in counts - {None}:
        return "is a router"
    return ""


def _why_read(model: PreTrainedModel, name: str) -> str:
    """Why a linear must stay as it is whose weight, or the type of it, a module around it reads; '' if none does."""
    owner, _, own = name.rpartition(".")
    within = f"{owner.rpartition('.')[2]}.{own}"
    found = re.search(rf"self\.{own}\.weight\b", _source(type(model.get_submodule(owner))))
    while owner and not found:
        owner = owner.rpartition(".")[0]
        found = re.search(rf"\.{within}\.weight\b", _source(type(model.get_submodule(owner))))
    return "its weight is also read by a module that holds it" if found else ""


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes just what its kind does."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _multiplies(module: Any) -> bool:
    """Whether a linear, also one with a forward of its own, multiplies by its weight, adds its bias, and no more."""
    more = any(name not in ("weight", "bias") for name in {**module._parameters, **module._buffers, **module._modules})
    if not isinstance(module, nn.Linear) or more:
        return False
    if _is(module, nn.Linear):
        return True
    small, generator = copy.copy(module), torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 4), (3,), (2, 4)))
    small._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    small.in_features, small.out_features = 4, 3
    try:
        with torch.no_grad():
            found = small(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it needs more than that
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, linear(x, weight, small._parameters["bias"]))


def _is_plain_embedding(module: nn.Module) -> bool:
    return _is(module, nn.Embedding) or (isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"))
