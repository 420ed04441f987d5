"""Which tensor of a checkpoint fills which place of a model: files name them with other prefixes, and hold more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from paley.format.header import TensorInfo

__all__ = ["belongs", "place", "summed_up"]

Infos = dict[str, TensorInfo]


def place(infos: Mapping[str, TensorInfo], model: PreTrainedModel) -> Infos:
    """The tensors under the names that the model has for them.

    Files of a bare model leave `model.` out; those of a vision-language model put `language_model.` or more before it.
    """
    base, wanted = f"{model.base_model_prefix}.", list(model.state_dict())
    tails = [name.removeprefix(base) for name in wanted if name.startswith(base)]
    prefix = _prefix(infos, base, tails)
    children = dict(model.base_model.named_children())
    placed = {}
    for name, info in infos.items():
        rest = name.removeprefix(prefix)
        if prefix != base and name.startswith(prefix) and rest.partition(".")[0] in children:
            name = base + rest
        placed[name] = info
    for name in wanted:
        if not name.startswith(base) and name not in placed:  # the head
            heads = [n for n in placed if n.endswith(f".{name}")]
            own = [n for n in heads if prefix.startswith(n.removesuffix(name))]
            if own or (len(heads) == 1 and name not in model.all_tied_weights_keys):  # a tied one need not be there
                placed[name] = placed.pop((own or heads)[0])
    return placed


def belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor that the model lacks would be part of a module that it has, and so change what that computes."""
    module: nn.Module = model
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return module is not model and module is not model.base_model and not isinstance(module, nn.ModuleList)


def summed_up(names: list[str], shown: int = 3) -> str:
    """'mtp.fc.weight, visual.* (120 tensors)': tensors by the first part of their names, single ones in full."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[: 2 if parts[0] in ("model", "transformer") else 1]), []).append(name)
    texts = [found[0] if len(found) == 1 else f"{group}.* ({len(found)} tensors)" for group, found in groups.items()]
    return ", ".join(texts[:shown]) + (f" and {len(texts) - shown} more kinds" if len(texts) > shown else "")


def _prefix(infos: Mapping[str, TensorInfo], base: str, tails: list[str]) -> str:
    """What stands in the files before names of the base model: under it most of them are there, and the base's wins."""
    anchors = {*tails[:1], *tails[-1:]}
    prefixes = {n.removesuffix(tail) for tail in anchors for n in infos if n == tail or n.endswith(f".{tail}")}
    return max({base, *prefixes}, key=lambda prefix: (sum(prefix + t in infos for t in tails), prefix == base))
